// Validates docs/asyncapi.yaml with the parser of AsyncAPI: node validate.mjs FOLDER DOCUMENT. FOLDER has node_modules.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const [folder, document] = process.argv.slice(2).map((word) => resolve(word));
const { Parser } = createRequire(`${folder}/`)("@asyncapi/parser");
const { document: parsed, diagnostics } = await new Parser().parse(readFileSync(document, "utf8"), { source: document });
const severities = ["error", "warning", "information", "hint"];
for (const { severity, code, path, message } of diagnostics) {
  console.log(`${severities[severity]}: ${code} at ${path.join(".")}: ${message}`);
}
// Hints and information are printed alone.
if (!parsed || diagnostics.some(({ severity }) => severity < 2)) process.exit(1);
const channels = parsed.channels().all();
const messages = channels.flatMap((channel) => channel.messages().all());
console.log(`valid: AsyncAPI ${parsed.version()}, channels: ${channels.length}, operations: ` +
  `${parsed.operations().all().length}, messages: ${messages.length}`);
