// Reads an AsyncAPI document on standard input; prints what the AsyncAPI project's own parser has against it, as JSON.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const require = createRequire(resolve(process.argv[2], "package.json"));
const { Parser } = require("@asyncapi/parser");
const { document, diagnostics } = await new Parser().parse(readFileSync(0, "utf8"));
const complaints = diagnostics.map(({ code, message, path, severity }) => ({ code, message, path, severity }));
process.stdout.write(JSON.stringify({ valid: document !== undefined, complaints }));
