// The page's side of the worker: one question at a time, and of those that come meanwhile only the last is asked.
export class Python {
  // onForm and onFailure are told once; ask() has its own answers
  constructor(onForm, onFailure) {
    this.running = null;
    this.next = null;
    this.worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    this.worker.onerror = (event) => onFailure(event.message || "the worker did not start");
    this.worker.onmessage = ({ data }) => {
      if (data.failure) onFailure(data.failure);
      if (data.form) onForm(data.form);
      if (data.shown) this.#answered(data.shown);
    };
  }

  // what the package shows for the text of an address, given to `onShown` unless a later question overtakes it
  ask(fragment, onShown) {
    this.next = { fragment, onShown };
    if (!this.running) this.#askNext();
  }

  #askNext() {
    this.running = this.next;
    this.next = null;
    if (this.running) this.worker.postMessage(this.running.fragment);
  }

  #answered(shown) {
    const { onShown } = this.running;
    this.#askNext();
    onShown(shown);
  }
}
