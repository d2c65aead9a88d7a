// A CSMS of ocpp-rpc, with a certificate authority of @peculiar/x509: no code of this project.
// Use: csms.mjs DIRECTORY-OF-PACKAGES PROTOCOL CERTIFICATE-TYPE CURVE BOOT...; BOOT is how each BootNotification is
// answered, the last one for good: close, CALLERROR, Pending, Rejected, Accepted. Prints events, one JSON object a line.
import { createRequire } from "node:module";
import { resolve } from "node:path";

const [packages, protocol, certificateType, namedCurve, ...boots] = process.argv.slice(2);
const require = createRequire(resolve(packages, "package.json"));
require("reflect-metadata");
const x509 = require("@peculiar/x509");
const { RPCServer, createRPCError } = require("ocpp-rpc");

const tell = (event) => process.stdout.write(`${JSON.stringify(event)}\n`);
const algorithm = { name: "ECDSA", namedCurve, hash: namedCurve === "P-521" ? "SHA-512" : "SHA-256" };
const [basicConstraints, keyUsage, extKeyUsage] = ["2.5.29.19", "2.5.29.15", "2.5.29.37"];

async function authority(name, pathLength, issuer) {
  const keys = await crypto.subtle.generateKey(algorithm, false, ["sign", "verify"]);
  const certificate = await x509.X509CertificateGenerator.create({
    subject: name,
    issuer: issuer?.certificate.subject ?? name,
    publicKey: keys.publicKey,
    signingKey: issuer?.keys.privateKey ?? keys.privateKey,
    signingAlgorithm: algorithm,
    extensions: [
      new x509.BasicConstraintsExtension(true, pathLength, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.keyCertSign | x509.KeyUsageFlags.cRLSign, true),
      await x509.SubjectKeyIdentifierExtension.create(keys.publicKey),
    ],
  });
  return { keys, certificate };
}

const root = await authority("CN=Foreign Root, O=Foreign", undefined);
const subCa = await authority("CN=Foreign Sub-CA, O=Foreign", 0, root);

async function certify(pem) {
  const csr = new x509.Pkcs10CertificateRequest(pem);
  if (!(await csr.verify())) throw createRPCError("FormatViolation", "the CSR's signature is wrong");
  const asked = [basicConstraints, keyUsage, extKeyUsage].map((type) => csr.getExtension(type)).filter(Boolean);
  const leaf = await x509.X509CertificateGenerator.create({
    subject: csr.subjectName,
    issuer: subCa.certificate.subject,
    publicKey: csr.publicKey,
    signingKey: subCa.keys.privateKey,
    signingAlgorithm: algorithm,
    extensions: [...asked, await x509.AuthorityKeyIdentifierExtension.create(subCa.keys.publicKey)],
  });
  tell({ event: "certified", subject: csr.subject, asked: asked.map(({ type, critical }) => [type, critical]) });
  return [leaf, subCa.certificate].map((one) => `${one.toString("pem")}\n`).join("");
}

const is16 = protocol === "ocpp1.6";
const [trigger, requestedMessage] = is16
  ? ["ExtendedTriggerMessage", "SignChargePointCertificate"]
  : ["TriggerMessage", `Sign${certificateType}`];

async function ask(client) {
  const { status } = await client.call(trigger, { requestedMessage });
  tell({ event: "triggered", status });
}

async function send(client, { csr, requestId }) {
  const type = is16 ? {} : { certificateType };
  const certificateChain = await certify(csr);
  const number = requestId === undefined ? {} : { requestId };
  const answer = await client.call("CertificateSigned", { certificateChain, ...type, ...number });
  tell({ event: "answered", status: answer.status, certificateChain });
}

// Its schemas of 2.1 have names that it does not find itself (2.2.1).
const server = new RPCServer({ protocols: [protocol], strictMode: protocol !== "ocpp2.1" });
server.on("client", (client) => {
  tell({ event: "connected", identity: client.identity, protocol: client.protocol });
  client.on("strictValidationFailure", ({ error }) => tell({ event: "invalid", error: error.message }));
  client.handle("BootNotification", async () => {
    const how = boots.length > 1 ? boots.shift() : boots[0];
    tell({ event: "boot", how });
    if (how === "close") await client.close({ code: 4999, force: true });
    if (how === "CALLERROR") throw createRPCError("InternalError");
    if (how === "Accepted") setImmediate(() => ask(client));
    return { status: how, interval: how === "Accepted" ? 300 : 1, currentTime: new Date().toISOString() };
  });
  client.handle("SignCertificate", ({ params }) => {
    setImmediate(() => send(client, params));
    return { status: "Accepted" };
  });
});
const http = await server.listen(0, "127.0.0.1");
tell({ event: "listening", port: http.address().port, root: root.certificate.toString("pem") });
process.stdin.resume().on("end", () => process.exit(0));
