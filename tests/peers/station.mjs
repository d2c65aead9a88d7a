// A charging station of ocpp-rpc, which verifies what it gets with @peculiar/x509: no code of this project.
// Use: station.mjs DIRECTORY-OF-PACKAGES URL PROTOCOL ROOTS.pem. It reads a CSR, as a JSON string in a line, for each
// trigger that it tells of. Prints events, one JSON object a line.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { createInterface } from "node:readline";

const [packages, endpoint, protocol, roots] = process.argv.slice(2);
const require = createRequire(resolve(packages, "package.json"));
require("reflect-metadata");
const x509 = require("@peculiar/x509");
const { RPCClient } = require("ocpp-rpc");

const tell = (event) => process.stdout.write(`${JSON.stringify(event)}\n`);
const is16 = protocol === "ocpp1.6";
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const certificates = (pem) => x509.PemConverter.decode(pem).map((der) => new x509.X509Certificate(der));
const trusted = certificates(readFileSync(roots, "latin1"));

// Two roots may have one name, with keys on different curves.
async function verified(chain) {
  const isBy = (certificate, issuer) => certificate.verify({ publicKey: issuer.publicKey }).catch(() => false);
  for (const certificate of chain) {
    const issuers = [...chain, ...trusted].filter(({ subject }) => subject === certificate.issuer);
    if (!(await Promise.all(issuers.map((issuer) => isBy(certificate, issuer)))).includes(true)) return false;
  }
  return chain.length > 0;
}

// Its schemas of 2.1 have names that it does not find itself (2.2.1).
const strictMode = protocol !== "ocpp2.1";
const station = new RPCClient({ endpoint, identity: "CS001", protocols: [protocol], strictMode, reconnect: false });
station.on("strictValidationFailure", ({ error }) => tell({ event: "invalid", error: error.message }));

async function sign({ requestedMessage }) {
  tell({ event: "triggered", requestedMessage });
  const csr = JSON.parse((await lines.next()).value);
  const type = is16 ? {} : { certificateType: requestedMessage.replace(/^Sign/, "") };
  const { status } = await station.call("SignCertificate", { csr, ...type });
  tell({ event: "signing", status });
}

station.handle(is16 ? "ExtendedTriggerMessage" : "TriggerMessage", ({ params }) => {
  setImmediate(() => sign(params));
  return { status: "Accepted" };
});
station.handle("CertificateSigned", async ({ params }) => {
  const accepted = await verified(certificates(params.certificateChain));
  tell({ event: "signed", accepted, certificateChain: params.certificateChain });
  return { status: accepted ? "Accepted" : "Rejected" };
});

await station.connect();
const boot = is16
  ? { chargePointVendor: "ocpp-rpc", chargePointModel: "judge" }
  : { reason: "PowerUp", chargingStation: { vendorName: "ocpp-rpc", model: "judge" } };
tell({ event: "booted", ...(await station.call("BootNotification", boot)) });
process.stdin.on("end", () => process.exit(0));
