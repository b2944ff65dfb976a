/** The images of results: fetched with the API key, so they are shown from object URLs. */

import { fetchOutput } from "./api.js";
import { element } from "./dom.js";
import { sentence } from "./words.js";

const KEPT = 150; // files; the browser holds them until their URLs are revoked
const AHEAD = "400px"; // of scrolling, in which images are fetched before they are seen

const urls = new Map(); // "<job id>/<number>" to a promise of an object URL, least recently used first

/**
 * Fetch an output, or give what was fetched before.
 *
 * @param {string} id
 * @param {number} number
 * @returns {Promise<string>} An object URL.
 */
export function outputUrl(id, number) {
  const name = `${id}/${number}`;
  const known = urls.get(name);
  urls.delete(name);
  const url = known ?? fetchOutput(id, number).then((blob) => URL.createObjectURL(blob));
  urls.set(name, url);
  if (!known) {
    url.catch(() => urls.delete(name));
    dropOldest();
  }
  return url;
}

function dropOldest() {
  for (const [name, url] of urls) {
    if (urls.size <= KEPT) return;
    urls.delete(name);
    url.then(URL.revokeObjectURL, () => {});
  }
}

/** Forget all files: they are those of another key. */
export function forgetOutputs() {
  for (const url of urls.values()) url.then(URL.revokeObjectURL, () => {});
  urls.clear();
}

const observer = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      observer.unobserve(target);
      target.dispatchEvent(new Event("near"));
    }
  },
  { rootMargin: AHEAD },
);

/**
 * Create an image that is fetched when it is about to be seen.
 *
 * @param {string} id
 * @param {{number: number, width: number, height: number, flagged?: boolean}} output
 * @param {string} alt
 * @returns {HTMLElement} A frame with the image, or with what went wrong.
 */
export function outputImage(id, output, alt) {
  const { width, height } = output;
  const image = element("img", { alt, width, height, decoding: "async" });
  const frame = element("span", { class: "frame", "data-state": "loading" }, image);
  if (output.flagged) frame.dataset.flagged = "";
  if (Math.max(width, height) <= 128) frame.dataset.tiny = "";
  frame.addEventListener("near", () => load(frame, image, id, output.number));
  observer.observe(frame);
  return frame;
}

async function load(frame, image, id, number) {
  try {
    image.src = await outputUrl(id, number);
    await image.decode();
    frame.dataset.state = "done";
  } catch (error) {
    frame.dataset.state = "failed";
    const gone = error.status === 404;
    const text = gone
      ? "This image is no longer stored."
      : sentence(error.message ?? "It cannot be shown");
    frame.replaceChildren(element("span", { class: "frame-text" }, text));
  }
}

const SUFFIXES = { "image/png": "png", "image/webp": "webp", "image/jpeg": "jpg" };

/**
 * Name the file of an output.
 *
 * @param {string} title Of its job.
 * @param {{media_type: string, seed: number}} output
 */
export function fileName(title, output) {
  const words = title
    .toLowerCase()
    .normalize("NFKD")
    .replace(/[^a-z0-9]+/g, "-");
  const name = words.slice(0, 60).replace(/^-+|-+$/g, "") || "image";
  return `${name}-${output.seed}.${SUFFIXES[output.media_type] ?? "png"}`;
}

/**
 * Create a link that saves an output.
 *
 * @param {import("./jobs.js").Job} job
 * @param {Object} output
 * @param {Object} attributes
 * @param {...Node} children
 */
export function downloadLink(job, output, attributes, ...children) {
  const name = fileName(job.title, output);
  const href = `v1/jobs/${encodeURIComponent(job.id)}/outputs/${output.number}`;
  const save = async (event) => {
    event.preventDefault(); // the browser would ask without the API key
    try {
      const url = await outputUrl(job.id, output.number);
      element("a", { href: url, download: name }).click();
    } catch (error) {
      event.target.dispatchEvent(
        new CustomEvent("problem", { bubbles: true, detail: error.message }),
      );
    }
  };
  return element("a", { ...attributes, href, download: name, on: { click: save } }, ...children);
}
