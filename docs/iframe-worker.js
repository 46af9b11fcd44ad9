/* Browsers start no workers from disk. There the search, a classic worker, runs in a hidden frame of the page instead. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #frame = document.createElement("iframe")
    #waiting = [] // messages that are posted before the script runs

    constructor(url) {
      super()
      this.#frame.hidden = true
      document.body.append(this.#frame)
      const scope = this.#frame.contentWindow
      scope.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      scope.importScripts = (...urls) => urls.reduce((before, next) => before.then(() => load(scope, next)), Promise.resolve())
      load(scope, url).then(() => {
        this.#waiting.forEach(data => deliver(scope, data))
        this.#waiting = null
      })
    }

    postMessage(data) {
      if (this.#waiting) this.#waiting.push(data)
      else deliver(this.#frame.contentWindow, data)
    }

    terminate() {
      this.#frame.remove()
    }
  }

  const deliver = (scope, data) => scope.dispatchEvent(new scope.MessageEvent("message", { data }))

  const load = (scope, url) =>
    new Promise((resolve, reject) => {
      const script = scope.document.createElement("script")
      Object.assign(script, { src: new URL(url, document.baseURI).href, onload: resolve, onerror: reject })
      scope.document.head.append(script)
    })
}
