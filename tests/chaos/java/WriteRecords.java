import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Base64;
import java.util.List;
import java.util.Properties;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerConfig;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.KafkaException;
import org.apache.kafka.common.errors.AuthorizationException;
import org.apache.kafka.common.errors.OutOfOrderSequenceException;
import org.apache.kafka.common.errors.ProducerFencedException;
import org.apache.kafka.common.errors.TimeoutException;
import org.apache.kafka.common.serialization.ByteArraySerializer;

/**
 * Writes records in transactions with Kafka's own client. Reads one line for each record from stdin:
 *
 *     partition or -, key, value, then name and value of each header
 *
 * separated by spaces, everything but the partition in Base64, "-" for null; and after the records of a transaction
 * "commit" or "abort". Answers each of these with a line: "done", or "failed" and the reason. Exits at the end of input.
 */
public final class WriteRecords {
    private static final int CALL_MAX_MS = 5_000;
    private static final int DELIVERY_MAX_MS = 15_000;
    private static final int ABANDONED_MS = 5_000;
    /** How often a commit without an answer is repeated. */
    private static final int TRIES_MAX = 3;

    private final Properties settings = new Properties();
    private final String topic;
    private KafkaProducer<byte[], byte[]> producer;

    private WriteRecords(String servers, String topic, String transactionalId, String compression) {
        this.topic = topic;
        settings.put(ProducerConfig.BOOTSTRAP_SERVERS_CONFIG, servers);
        settings.put(ProducerConfig.KEY_SERIALIZER_CLASS_CONFIG, ByteArraySerializer.class);
        settings.put(ProducerConfig.VALUE_SERIALIZER_CLASS_CONFIG, ByteArraySerializer.class);
        settings.put(ProducerConfig.TRANSACTIONAL_ID_CONFIG, transactionalId);
        settings.put(ProducerConfig.TRANSACTION_TIMEOUT_CONFIG, ABANDONED_MS);
        settings.put(ProducerConfig.COMPRESSION_TYPE_CONFIG, compression);
        settings.put(ProducerConfig.LINGER_MS_CONFIG, 5);
        settings.put(ProducerConfig.MAX_BLOCK_MS_CONFIG, CALL_MAX_MS);
        settings.put(ProducerConfig.REQUEST_TIMEOUT_MS_CONFIG, CALL_MAX_MS);
        settings.put(ProducerConfig.DELIVERY_TIMEOUT_MS_CONFIG, DELIVERY_MAX_MS);
    }

    public static void main(String[] arguments) throws IOException {
        WriteRecords writer = new WriteRecords(arguments[0], arguments[1], arguments[2], arguments[3]);
        BufferedReader lines =
            new BufferedReader(new InputStreamReader(System.in, StandardCharsets.US_ASCII));
        List<ProducerRecord<byte[], byte[]>> records = new ArrayList<>();
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            if (line.equals("commit") || line.equals("abort")) {
                System.out.println(writer.write(records, line.equals("commit")));
                records.clear();
            } else {
                records.add(writer.record(line.split(" ")));
            }
        }
        writer.close();
    }

    private ProducerRecord<byte[], byte[]> record(String[] words) {
        Integer partition = words[0].equals("-") ? null : Integer.valueOf(words[0]);
        ProducerRecord<byte[], byte[]> record =
            new ProducerRecord<>(topic, partition, bytes(words[1]), bytes(words[2]));
        for (int at = 3; at + 1 < words.length; at += 2) {
            record.headers().add(new String(bytes(words[at]), StandardCharsets.UTF_8), bytes(words[at + 1]));
        }
        return record;
    }

    /** An empty value is written as a character that Base64 does not have, since words must not be empty. */
    private static byte[] bytes(String word) {
        return word.equals("-") ? null : word.equals(".") ? new byte[0] : Base64.getDecoder().decode(word);
    }

    private String write(List<ProducerRecord<byte[], byte[]>> records, boolean isCommitted) {
        try {
            if (producer == null) {
                producer = new KafkaProducer<>(settings);
                producer.initTransactions();
            }
            producer.beginTransaction();
            for (ProducerRecord<byte[], byte[]> record : records) {
                producer.send(record);
            }
            // Before an abort, too: unsent records would never reach the log.
            producer.flush();
            end(isCommitted);
            return "done";
        } catch (KafkaException | IllegalStateException error) {
            String why = String.valueOf(error).replace('\n', ' ');
            if (!abort(error)) {
                close();
            }
            return "failed " + why;
        }
    }

    private void end(boolean isCommitted) {
        for (int tries = 1; ; tries++) {
            try {
                if (isCommitted) {
                    producer.commitTransaction();
                } else {
                    producer.abortTransaction();
                }
                return;
            } catch (TimeoutException error) {
                if (tries == TRIES_MAX) {
                    throw error;
                }
            }
        }
    }

    /** Whether the producer can be used again. */
    private boolean abort(RuntimeException error) {
        boolean isFatal = error instanceof ProducerFencedException || error instanceof OutOfOrderSequenceException
            || error instanceof AuthorizationException || error instanceof IllegalStateException
            || error instanceof TimeoutException;
        if (isFatal || producer == null) {
            return false;
        }
        try {
            producer.abortTransaction();
            return true;
        } catch (KafkaException | IllegalStateException again) {
            return false;
        }
    }

    private void close() {
        if (producer != null) {
            producer.close(Duration.ZERO);
            producer = null;
        }
    }
}
