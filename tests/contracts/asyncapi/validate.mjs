// Reads an AsyncAPI document from standard input; prints what is wrong with it, and fails then.
import { readFileSync } from "node:fs";
import { Parser } from "@asyncapi/parser";

const { document, diagnostics } = await new Parser().parse(readFileSync(0, "utf8"));
// 0 is an error and 1 a warning; what is below are hints, such as that a license is not named.
const wrong = diagnostics.filter((one) => one.severity <= 1);
for (const one of wrong) console.error(`${one.path.join(".")}: ${one.message}`);
if (!document || wrong.length > 0) process.exit(1);
console.log(`${document.channels().all().length} channels, ${document.messages().all().length} messages`);
