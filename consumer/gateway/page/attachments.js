/** The images of a question: uploaded files and outputs of earlier jobs. */

import { byId, element, iconButton } from "./dom.js";
import { outputImage } from "./outputs.js";
import { encodeImages, readImage } from "./uploads.js";

const MAX_IMAGES = 16; // per request

export class Attachments extends EventTarget {
  #items = [];
  #list = byId("attachments");

  constructor() {
    super();
    const input = byId("files");
    input.addEventListener("change", () => {
      this.addFiles([...input.files]); // a copy, because the next line empties the list
      input.value = ""; // so that the user can choose the same file again
    });
  }

  get size() {
    return this.#items.length;
  }

  /** Thumbnails of the files, as data URLs. */
  get thumbnails() {
    return this.#items.flatMap((item) => (item.kind === "file" ? [item.thumbnail] : []));
  }

  /** References to the outputs of earlier jobs, as `{id, number}`. */
  get outputs() {
    return this.#items.flatMap((item) =>
      item.kind === "output" ? [{ id: item.id, number: item.output.number }] : [],
    );
  }

  /** Add files. A file that is no image leads to a `problem` event. */
  async addFiles(files) {
    for (const file of files) {
      if (this.size >= MAX_IMAGES)
        return this.#problem(`A request takes at most ${MAX_IMAGES} images.`);
      try {
        this.#items.push(await readImage(file));
        this.#changed();
      } catch (error) {
        this.#problem(error.message);
      }
    }
  }

  /** Attach an image of a result in place of all others. */
  setOutput(job, output) {
    this.#items = [{ kind: "output", id: job.id, output, name: job.title }];
    this.#changed();
  }

  clear() {
    this.#items = [];
    this.#changed();
  }

  /** Return the `images` field of a request. */
  async encoded() {
    const files = this.#items.filter((item) => item.kind === "file").map((item) => item.file);
    const inline = await encodeImages(files);
    return this.#items.map((item) => {
      if (item.kind === "file") return inline.shift();
      return { bucket: item.output.bucket, key: item.output.key };
    });
  }

  #problem(message) {
    this.dispatchEvent(new CustomEvent("problem", { detail: message }));
  }

  #changed() {
    this.#list.replaceChildren(...this.#items.map((item) => this.#row(item)));
    this.dispatchEvent(new Event("change"));
  }

  #row(item) {
    const alt = `Attached: ${item.name}`;
    const image =
      item.kind === "file"
        ? element("img", { src: item.thumbnail, alt })
        : outputImage(item.id, item.output, alt);
    const remove = iconButton("close", `Remove ${item.name}`, () => {
      const index = this.#items.indexOf(item);
      this.#items.splice(index, 1);
      this.#changed();
      const next = this.#list.querySelectorAll("button")[Math.min(index, this.size - 1)];
      (next ?? byId("files")).focus();
    });
    return element("li", {}, image, remove);
  }
}

/**
 * Receive images that the user drops on the page or pastes into it.
 *
 * @param {(files: File[]) => void} onFiles
 */
export function bindDropAndPaste(onFiles) {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  const mark = (on) => document.body.classList.toggle("dragging", on);
  let depth = 0; // nested elements entered; leaving a child element is not leaving the page
  addEventListener("dragenter", (event) => {
    if (!hasFiles(event)) return;
    depth += 1;
    mark(true);
  });
  addEventListener("dragleave", (event) => {
    if (!hasFiles(event)) return;
    depth = Math.max(0, depth - 1);
    if (depth === 0) mark(false);
  });
  addEventListener("dragover", (event) => {
    if (hasFiles(event)) event.preventDefault();
  });
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    depth = 0;
    mark(false);
    onFiles([...event.dataTransfer.files]);
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])].filter((file) =>
      file.type.startsWith("image/"),
    );
    if (!files.length) return;
    event.preventDefault();
    onFiles(files);
  });
}
