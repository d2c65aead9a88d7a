// aedes, an MQTT broker by another hand. Use: broker.mjs DIRECTORY-OF-PACKAGES PORT [DIRECTORY]; with a directory its
// sessions survive it.
import { createRequire } from "node:module";
import { createServer } from "node:net";
import { resolve } from "node:path";

const [packages, port, directory] = process.argv.slice(2);
const require = createRequire(resolve(packages, "package.json"));
const { Aedes } = require("aedes");
const stored = () => require("aedes-persistence-level")(new (require("classic-level").ClassicLevel)(directory));

const broker = await Aedes.createBroker(directory === undefined ? {} : { persistence: stored() });
createServer({ noDelay: true }, broker.handle).listen(Number(port), "127.0.0.1");
// What it has acknowledged may not be with the database yet.
process.on("SIGTERM", () => broker.close(() => process.exit(0)));
