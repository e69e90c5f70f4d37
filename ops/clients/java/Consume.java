import static java.nio.charset.StandardCharsets.UTF_8;

import com.fasterxml.jackson.databind.DeserializationFeature;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.time.Duration;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.common.serialization.StringDeserializer;

public class Consume {
    public static void main(String[] args) throws Exception {
        var json = new ObjectMapper().enable(DeserializationFeature.USE_BIG_DECIMAL_FOR_FLOATS);
        var settings = Map.<String, Object>of(
                "bootstrap.servers", args[0], "group.id", args[2], "isolation.level", "read_committed",
                "auto.offset.reset", "earliest", "enable.auto.commit", false);
        Set<String> seen = new HashSet<>(); // in a service: a unique column of its database
        try (var consumer = new KafkaConsumer<>(settings, new StringDeserializer(), new StringDeserializer())) {
            consumer.subscribe(List.of(args[1]));
            for (var records = consumer.poll(Duration.ofSeconds(20)); !records.isEmpty();
                    records = consumer.poll(Duration.ofSeconds(5))) {
                for (var record : records) {
                    // The same for a record that this group reads twice, as after a crash before its commit.
                    String source = new String(record.headers().lastHeader("source").value(), UTF_8);
                    if (seen.add(source)) {
                        var event = json.readTree(record.value());
                        System.out.println(source + " " + record.key() + " " + event.get("id").asText() + " "
                                + event.get("amount").decimalValue().toPlainString()); // the work
                    }
                }
                consumer.commitSync(); // after the work, never before
            }
        }
    }
}
