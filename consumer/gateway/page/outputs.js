/** The images of results. The page fetches them with the API key and shows object URLs. */

import { fetchOutput } from "./api.js";
import { element } from "./dom.js";
import { sentence } from "./format.js";

const CACHE_LIMIT = 150; // files; the browser stores each file until its URL is revoked
const PRELOAD_MARGIN = "400px"; // distance from the visible area at which the page fetches an image

const urls = new Map(); // promises of object URLs by "<job id>/<number>", least recently used first

/**
 * Fetch an output, or return the cached one.
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
    if (urls.size <= CACHE_LIMIT) return;
    urls.delete(name);
    url.then(URL.revokeObjectURL, () => {});
  }
}

/** Remove all files from the cache: they belong to another key. */
export function clearOutputs() {
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
  { rootMargin: PRELOAD_MARGIN },
);

/**
 * Create an image that the page fetches when it comes near the visible area.
 *
 * @param {string} id
 * @param {{number: number, width: number, height: number, flagged?: boolean}} output
 * @param {string} alt
 * @returns {HTMLElement} A frame with the image, or with an error message.
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
    const missing = error.status === 404;
    const text = missing
      ? "This image is no longer stored."
      : sentence(error.message ?? "The image cannot be shown");
    frame.replaceChildren(element("span", { class: "frame-text" }, text));
  }
}

const SUFFIXES = { "image/png": "png", "image/webp": "webp", "image/jpeg": "jpg" };

/**
 * Return a file name for an output.
 *
 * @param {string} title Title of its job.
 * @param {{media_type: string, number: number, key?: string, seed?: number}} output A file that is
 *   no image has no seed; its key ends with its extension.
 */
export function fileName(title, output) {
  const words = title
    .toLowerCase()
    .normalize("NFKD")
    .replace(/[^a-z0-9]+/g, "-");
  const name = words.slice(0, 60).replace(/^-+|-+$/g, "") || "image";
  const suffix = SUFFIXES[output.media_type] ?? output.key?.split(".").pop() ?? "png";
  return `${name}-${output.seed ?? output.number}.${suffix}`;
}

/**
 * Create a download link for an output.
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
    event.preventDefault(); // the browser would send the request without the API key
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
