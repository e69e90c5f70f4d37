import static java.nio.charset.StandardCharsets.UTF_8;

import java.security.SecureRandom;
import java.util.Map;
import java.util.UUID;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.KafkaException;
import org.apache.kafka.common.errors.AuthorizationException;
import org.apache.kafka.common.errors.OutOfOrderSequenceException;
import org.apache.kafka.common.errors.ProducerFencedException;
import org.apache.kafka.common.serialization.StringSerializer;

public class Produce {
    static final SecureRandom RANDOM = new SecureRandom();

    /** A UUID of version 7: 48 bits of time in ms, then random bits. */
    static UUID uuid7() {
        long time = System.currentTimeMillis() << 16 | 0x7000 | RANDOM.nextLong() & 0xFFF;
        return new UUID(time, RANDOM.nextLong() & 0x3FFF_FFFF_FFFF_FFFFL | 0x8000_0000_0000_0000L);
    }

    public static void main(String[] args) {
        String topic = args[1];
        int count = Integer.parseInt(args[2]);
        // Defaults since Kafka 3.0: acks=all, enable.idempotence=true. The default partitioner is the right one.
        var settings = Map.<String, Object>of(
                "bootstrap.servers", args[0], "transactional.id", "shop-java-1", "compression.type", "zstd");
        try (var producer = new KafkaProducer<>(settings, new StringSerializer(), new StringSerializer())) {
            producer.initTransactions();
            producer.beginTransaction();
            try {
                for (int n = 0; n < count; n++) {
                    // The id is made once for each payment and stored with it: a repeat has the same one.
                    UUID id = uuid7();
                    String account = String.valueOf(n % 50 + 1);
                    String value = """
                            {"messageId":"%s","amount":%d.50,"status":2,"currency":"EUR","custId":%s,"type":"BWI"}"""
                            .formatted(id, n + 1, account);
                    String trace = "00-%s-%016x-01".formatted(id.toString().replace("-", ""), n + 1);
                    var record = new ProducerRecord<>(topic, account, value);
                    record.headers()
                            .add("schema-version", "1".getBytes(UTF_8))
                            .add("correlation-id", ("order-" + n).getBytes(UTF_8))
                            .add("traceparent", trace.getBytes(UTF_8));
                    producer.send(record);
                }
                producer.commitTransaction(); // throws if a record was not written
            } catch (ProducerFencedException | OutOfOrderSequenceException | AuthorizationException fatal) {
                throw fatal; // as if another process has this transactional.id, or rights are missing: end this one
            } catch (KafkaException error) {
                producer.abortTransaction(); // then send the same payments again, with the same ids
                throw error;
            }
        }
        System.out.println("sent " + count);
    }
}
