// Search where the pages are opened from disk: browsers start no worker there, so its script runs in
// a hidden frame. On a server the browser's own worker stays.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc = `<script src="${new URL(url, location)}"></script>`
      this.frame.onload = () => {
        this.frame.contentWindow.postMessage = data =>
          this.dispatchEvent(new MessageEvent("message", { data }))
        this.waiting.splice(0).forEach(data => this.hand(data))
        this.loaded = true
      }
      document.body.append(this.frame)
    }

    postMessage(data) {
      if (this.loaded) this.hand(data)
      else this.waiting.push(data)
    }

    hand(data) {
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
    }
  }
}
