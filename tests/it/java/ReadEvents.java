import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.datatype.jsr310.JavaTimeModule;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.math.BigDecimal;
import java.nio.charset.StandardCharsets;
import java.time.LocalDateTime;
import java.util.UUID;

/**
 * Reads one event a line from standard input, as the Java original does: Jackson with its defaults, times as
 * LocalDateTime (lenient: a trailing Z is taken as UTC and dropped). An unknown field is an error here.
 * Prints each event's fields, separated by bars.
 */
public class ReadEvents {
    public static class ReadEvent {
        public String messageId;
        public UUID id;
        public LocalDateTime createdAt;
        public LocalDateTime updatedAt;
        public BigDecimal amount;
        public int status;
        public String currency;
        public long custId;
        public String type;
        public String comment;
        public int version;
    }

    public static void main(String[] arguments) throws Exception {
        ObjectMapper mapper = new ObjectMapper().registerModule(new JavaTimeModule());
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            ReadEvent event = mapper.readValue(line, ReadEvent.class);
            String fields = String.join("|", event.messageId, event.id.toString(), event.createdAt.toString(),
                event.updatedAt.toString(), event.amount.toPlainString(), "" + event.status, event.currency,
                "" + event.custId, event.type, event.comment, "" + event.version) + "\n";
            System.out.write(fields.getBytes(StandardCharsets.UTF_8));
        }
        System.out.flush();
    }
}
