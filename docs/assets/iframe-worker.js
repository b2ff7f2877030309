// Search from files: browsers start no worker of a page that was opened from a file, so a hidden frame runs its script instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.srcdoc = "<!doctype html>";
      this.ready = new Promise((started, failed) => {
        this.frame.addEventListener("load", () => this.run(new URL(url, location), started, failed), { once: true });
      });
      document.body.append(this.frame);
    }

    run(url, started, failed) {
      const inner = this.frame.contentWindow;
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = inner.document.createElement("script");
      script.onload = started;
      script.onerror = () => failed(new Error(`${url} cannot be read`));
      script.src = url;
      inner.document.head.append(script);
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
