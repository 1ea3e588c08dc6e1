// Runs fusedlr's schedule package in Pyodide, away from the page's own thread. The first message out describes
// the form; then every message in is the text of an address, and every message out is what the page shows for it.
import { loadPyodide } from "./vendor/pyodide/pyodide.mjs";

const vendor = new URL("./vendor/", import.meta.url);

async function start() {
  const [python, archive] = await Promise.all([
    loadPyodide({ indexURL: new URL("pyodide/", vendor).href }),
    fetch(new URL("fusedlr.zip", vendor)).then((reply) => {
      if (!reply.ok) throw new Error(`${reply.url} is missing: ${reply.status}`);
      return reply.arrayBuffer();
    }),
  ]);
  python.unpackArchive(archive, "zip");
  python.runPython("import json\nfrom fusedlr.schedule import page");
  const form = python.runPython("json.dumps(page.form())");
  postMessage({ form: JSON.parse(form) });
  return python.runPython("lambda fragment: json.dumps(page.show(fragment), allow_nan=False)");
}

const show = start();
show.catch((error) => postMessage({ failure: String(error) }));

onmessage = async ({ data }) => {
  try {
    postMessage({ shown: JSON.parse((await show)(data)) });
  } catch (error) {
    postMessage({ failure: String(error) });
  }
};
