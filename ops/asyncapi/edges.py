"""Payment messages at the borders of the rules, beside those that `payment-writer produce` makes. Each is a valid
message with the text of one field replaced; which of them are valid, the daemon and the schema say."""

import secrets
import time
import uuid

STRINGS = {
    "messageId": ["{upper}", "{upper}\\n", "{{{id}}}", "urn:uuid:{id}", "{simple}", "0{ulid}", "{ulid}\\n",
                  "8{ulid_tail}", "00000000000000000000000000", "00000000-0000-0000-0000-000000000001", ""],
    "amount": ["10.50", "1E+3", "0", "0.00", "0e5", "-1", "+1", " 1", "1 ", "1.", ".5", "01", "1\\n", "1e14", "1e13",
               "0x1", "NaN", "99999999999999.99", "100000000000000", "1.001", "1.000", ""],
    "currency": ["EUR", "eur", "EURO", "EUR ", "XAU", "BGN", ""],
    "type": ["BWI", "bwi", "BWI ", ""],
    "comment": ["", "\U0001f4b6" * 1000, "\U0001f4b6" * 1001, "\\ud83d\\udcb6", "a\\u0000", "\\u0001"],
    "externalRefId": ["", "\u00fc" * 64, "\u00fc" * 65, "\\u0000"],
}
OTHERS = {
    "messageId": ["null", "7", "[]"],
    "custId": ["0", "-0", "9223372036854775807", "9223372036854775808", "1.0", "1e1", "null", "true", "{{}}"],
    "amount": ["1E+3", "0.01", "0.0", "-0.01", "99999999999999.99", "1e14", "1.001", "1.000", "1e-400", "1e400",
               "null", "[1]"],
    "currency": ["null", "978"],
    "status": ["2", "0", "-2", "-0", "2.0", "2e0", "1", "\"2\"", "null"],
    "type": ["null", "1"],
    "comment": ["null", "1", "[]"],
    "externalRefId": ["null", "false"],
    "unknown": ["{{\"a\":[1,{{\"b\":null}}]}}", "[" * 31 + "]" * 31, "[" * 32 + "]" * 32, "{{\"a\":1,\"a\":2}}",
                "\"\\udc00\"", "1e999", "01", "NaN", "\"\t\""],
}
# Values as they are.
WHOLE = ["[]", "null", "\"text\"", "{{}}", "{{}}{{}}", "{{\"messageId\":1,\"messageId\":2}}", "\ufeff{good}",
         " {good}\n"]
# Headers of records whose value is valid.
HEADERS = [[("schema-version", text)] for text in (b"1", b"", b"01", b"1 ", b"1\n", b"2", None)]
# As an object of texts, the last one counts; the daemon looks at each.
HEADERS += [[("schema-version", b"2"), ("schema-version", b"1")]]
HEADERS += [[(name, text)] for name in ("correlation-id", "traceparent", "dlq-replays", "other") for text in (b"", b"x", None)]
# Keys and values at the sizes from which a dead letter leaves them out.
LONG = [("4711", "x" * length) for length in (512 << 10, (512 << 10) + 1)]
LONG += [("1" * length, "{}") for length in (64 << 10, (64 << 10) + 1)]
BASE32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def uuid7():
    bits = int(time.time() * 1000) << 80 | 7 << 76 | secrets.randbits(12) << 64 | 2 << 62 | secrets.randbits(62)
    return uuid.UUID(int=bits)


def ulid(number):
    return "".join(BASE32[number >> 5 * place & 31] for place in range(25, -1, -1))


def message(field=None, text=None):
    """Key and value of a message; the text of one field is replaced or, if there is none, left out."""
    number = uuid7()
    names = {"id": str(number), "upper": str(number).upper(), "simple": number.hex, "ulid": ulid(number.int)[-26:],
             "ulid_tail": ulid(number.int)[1:]}
    fields = {"messageId": f'"{number}"', "amount": "10.50", "status": "2", "currency": '"EUR"', "custId": "4711",
              "type": '"BWI"'}
    if field:
        fields[field] = text.format(**names)
    key = fields["custId"] if fields["custId"].isdigit() else "4711"
    return key, "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"


def messages():
    for field, texts in STRINGS.items():
        for text in texts:
            yield message(field, f'"{text}"')
    for field, texts in OTHERS.items():
        for text in texts:
            yield message(field, text)
    for text in WHOLE:
        key, good = message()
        yield key, text.format(good=good)
