// A TLS client or server that uses Node.js, for test_tls_peers.py. The usage is as for peer.go.
"use strict";

const fs = require("fs");
const net = require("net");
const tls = require("tls");

const options = {};
const [role, ...rest] = process.argv.slice(2);
while (rest.length) {
  const option = rest.shift().slice(1);
  options[option] = option === "require" ? true : rest.shift();
}

function fail(error) {
  process.exitCode = 1;
  console.error("error:", error.code, error.message);
}

function report(socket) {
  const certificate = socket.getPeerCertificate();
  console.error(
    `agreed: version=${socket.getProtocol()} alpn=${socket.alpnProtocol || ""}` +
      ` name=${socket.servername || ""} reused=${socket.isSessionReused()}` +
      ` certificates=${certificate && certificate.raw ? 1 : 0}`,
  );
}

const file = (name) => (options[name] ? fs.readFileSync(options[name]) : undefined);
const common = {
  ca: file("ca"),
  cert: file("cert"),
  key: file("key"),
  minVersion: options.version,
  maxVersion: options.version,
  ALPNProtocols: options.alpn ? options.alpn.split(",") : undefined,
};

function connect(session) {
  const [host, port] = options.connect.split(":");
  const name = options.name;
  const socket = tls.connect({
    ...common,
    host,
    port,
    session,
    servername: net.isIP(name) ? "" : name,
    checkServerIdentity: (_, certificate) => tls.checkServerIdentity(name, certificate),
  });
  socket.on("error", fail);
  return socket;
}

function visit(visits, session) {
  if (visits === 0) return;
  const socket = connect(session);
  socket.on("session", (received) => (session = received));
  socket.on("secureConnect", () => socket.write("hello\n"));
  socket.on("data", () => {
    report(socket);
    socket.end();
  });
  socket.on("close", () => visit(visits - 1, session));
}

if (role === "client" && options.visits) {
  visit(Number(options.visits));
} else if (role === "client") {
  const socket = connect();
  socket.on("secureConnect", () => {
    report(socket);
    process.stdin.pipe(socket);
    socket.pipe(process.stdout);
    socket.on("close", () => process.stdin.destroy());
  });
} else {
  const server = tls.createServer({
    ...common,
    requestCert: Boolean(options.ca),
    rejectUnauthorized: Boolean(options.ca),
  });
  if (options.ca && !options.require) throw new Error("Node.js cannot request an optional certificate");
  server.on("secureConnection", (socket) => {
    report(socket);
    socket.on("error", (error) => console.error("ended:", error.code, error.message));
    socket.on("end", () => console.error("ended: EOF"));
    socket.pipe(socket);
  });
  server.on("tlsClientError", (error) => console.error("ended:", error.code, error.message));
  server.listen(0, "127.0.0.1", () => console.log("port", server.address().port));
}
