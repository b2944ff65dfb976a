/** The gallery: ended jobs, newest first, in pages. */

import { listJobs } from "./api.js";
import { byId, element, icon, iconButton } from "./dom.js";
import { Job, compareTimes } from "./jobs.js";
import { hideNotice, showNotice } from "./notices.js";
import { downloadLink, outputImage } from "./outputs.js";
import { copyButton, facts, fileFacts } from "./result_text.js";
import { formatTime, truncate } from "./format.js";

const PAGE = 24;
const SKELETONS = 6;
const FILTERS = {
  "": { states: ["succeeded", "failed", "cancelled"] },
  images: { task: "text_to_image", states: ["succeeded"] },
  answers: { task: "image_to_text", states: ["succeeded"] },
  failed: { states: ["failed"] },
  cancelled: { states: ["cancelled"] },
};
const EMPTY = {
  "": "No results yet. Your images and answers appear here.",
  images: "No images yet.",
  answers: "No answers yet.",
  failed: "No failed requests.",
  cancelled: "No cancelled requests.",
};

export class Results {
  #jobs = new Map();
  #cards = new Map();
  #list = byId("gallery");
  #cursor = null;
  #loaded = false; // whether the first page has arrived
  #loadNumber = 0; // number of loads; the response for an earlier load is dropped
  #actions;

  /**
   * @param {Object} actions
   * @param {(job: Job, number: number) => void} actions.open Called with an output number.
   * @param {(job: Job, output: Object) => void} actions.ask
   * @param {(job: Job) => void} actions.use
   */
  constructor(actions) {
    this.#actions = actions;
    byId("filter").addEventListener("change", () => this.load());
    byId("more").addEventListener("click", () => this.#loadPage());
  }

  /** All jobs of the gallery, in order. */
  get all() {
    return [...this.#jobs.values()].sort((a, b) => compareTimes(b, a) || (a.id < b.id ? 1 : -1));
  }

  /** Load the first page if an earlier load failed. */
  loadMissing() {
    if (!this.#loaded) this.load();
  }

  /** Reload the first page. */
  async load() {
    this.#loadNumber += 1;
    this.#loaded = false;
    this.#jobs.clear();
    this.#cards.clear();
    this.#cursor = null;
    this.#list.replaceChildren(...Array.from({ length: SKELETONS }, skeleton));
    byId("gallery-empty").hidden = true;
    await this.#loadPage();
  }

  /** Add a job that has just ended, if the filter accepts it. */
  add(job) {
    if (this.#jobs.has(job.id) || !matchesFilter(job, byId("filter").value)) return;
    if (this.#list.getAttribute("aria-busy") === "true") return; // the pending page contains it
    this.#insert(job);
    this.#showEnd();
  }

  async #loadPage() {
    const loadNumber = this.#loadNumber;
    const query = { limit: PAGE, ...FILTERS[byId("filter").value] };
    if (this.#cursor) query.after = this.#cursor;
    this.#list.setAttribute("aria-busy", "true");
    byId("more").setAttribute("aria-disabled", "true");
    let page;
    try {
      page = await listJobs(query);
    } catch (error) {
      if (loadNumber === this.#loadNumber) this.#failed(error);
      return;
    }
    if (loadNumber !== this.#loadNumber) return;
    this.#showPage(page);
  }

  #showPage(page) {
    this.#loaded = true;
    hideNotice("results");
    this.#list.querySelectorAll(".skeleton").forEach((card) => card.remove());
    this.#list.setAttribute("aria-busy", "false");
    this.#cursor = page.has_more ? page.next : null;
    const ended = page.data.map((doc) => new Job(doc)).filter((job) => job.ended);
    const first = ended.filter((job) => !this.#jobs.has(job.id)).map((job) => this.#insert(job))[0];
    if (document.activeElement === byId("more")) first?.querySelector("button")?.focus();
    if (!first && this.#cursor) return this.#loadPage(); // an empty page may not be the last one
    this.#showEnd();
  }

  #failed(error) {
    this.#list.setAttribute("aria-busy", "false");
    this.#list.querySelectorAll(".skeleton").forEach((card) => card.remove());
    byId("more").removeAttribute("aria-disabled");
    if (!this.#jobs.size) this.#showEmpty("The results cannot be loaded at the moment.");
    // The feed reports these errors.
    if (error.status === 401 || error.status === 403 || error.unreachable) return;
    const retry = {
      label: "Try again",
      onClick: () => (this.#jobs.size ? this.#loadPage() : this.load()),
    };
    showNotice("results", `The results cannot be loaded. ${error.message}`, retry);
  }

  #showEnd() {
    this.#showEmpty(this.#jobs.size === 0 && !this.#cursor ? EMPTY[byId("filter").value] : "");
    byId("more").hidden = !this.#cursor;
    byId("more").removeAttribute("aria-disabled");
  }

  #showEmpty(text) {
    byId("gallery-empty").textContent = text;
    byId("gallery-empty").hidden = !text;
  }

  #insert(job) {
    this.#jobs.set(job.id, job);
    const card = this.#card(job);
    this.#cards.set(job.id, card);
    const order = this.all;
    const next = order[order.indexOf(job) + 1];
    this.#list.insertBefore(card, next ? this.#cards.get(next.id) : null);
    return card;
  }

  #card(job) {
    const body =
      job.state !== "succeeded"
        ? this.#ended(job)
        : job.imageOutputs.length
          ? this.#images(job)
          : this.#answer(job);
    return element(
      "li",
      { class: "card", "data-state": job.state, "data-task": job.task },
      ...body,
    );
  }

  #images(job) {
    const outputs = job.imageOutputs;
    const images = outputs.slice(0, 4).map((output) => outputImage(job.id, output, ""));
    const badges = badgesOf(outputs);
    const label = `Details: ${[truncate(job.title, 120), ...badges].join(", ")}`;
    const tile = element(
      "button",
      { type: "button", class: "tile", "data-count": images.length, "aria-label": label },
      ...images,
      element(
        "span",
        { class: "badges" },
        ...badges.map((text) => element("span", { class: "badge" }, text)),
      ),
    );
    tile.addEventListener("click", () => this.#actions.open(job, outputs[0].number));
    return [
      tile,
      this.#caption(job),
      element(
        "div",
        { class: "card-actions" },
        iconButton("ask", "Ask about this image", () => this.#actions.ask(job, outputs[0])),
        this.#reuse(job),
        downloadLink(
          job,
          outputs[0],
          { class: "icon-button", "aria-label": "Download", title: "Download" },
          icon("download"),
        ),
      ),
    ];
  }

  #answer(job) {
    return [
      element(
        "div",
        { class: "card-text" },
        sources(job),
        this.#caption(job),
        job.answer === undefined ? null : element("p", { class: "answer" }, job.answer),
        ...job.fileOutputs.map((output) => downloadLink(job, output, {}, fileFacts(output))),
      ),
      element(
        "div",
        { class: "card-actions" },
        iconButton("info", "Details", () => this.#actions.open(job, 0)),
        this.#reuse(job),
        job.answer === undefined ? null : copyButton(job.answer),
      ),
    ];
  }

  #ended(job) {
    const failed = job.state === "failed";
    return [
      element(
        "div",
        { class: "card-text" },
        element(
          "p",
          { class: "state" },
          icon(failed ? "alert" : "stop"),
          failed ? "Failed" : "Cancelled",
        ),
        this.#caption(job),
        failed ? element("p", { class: "problem" }, job.problem) : null,
      ),
      element(
        "div",
        { class: "card-actions" },
        iconButton("info", "Details", () => this.#actions.open(job, 0)),
        job.input.prompt ? this.#reuse(job) : null,
      ),
    ];
  }

  #reuse(job) {
    if (!job.reusable) return null;
    return iconButton("reuse", "Use these parameters again", () => this.#actions.use(job));
  }

  #caption(job) {
    const time = element("time", { datetime: job.time }, formatTime(job.time));
    return element(
      "div",
      { class: "card-caption" },
      element("h3", { class: "card-title" }, truncate(job.title, 160)),
      element("p", { class: "hint" }, time, ...facts(job).map((fact) => element("span", {}, fact))),
    );
  }
}

/** Create the images of a question, as far as the page knows them; null without any. */
export function sources(job) {
  const { thumbnails, images } = job.input;
  const known = [
    ...thumbnails.map((src) => element("img", { src, alt: "" })),
    ...images.map(({ id, number }) => outputImage(id, { number, width: 64, height: 64 }, "")),
  ];
  return known.length ? element("div", { class: "sources" }, ...known) : null;
}

function badgesOf(outputs) {
  const flagged = outputs.some((output) => output.flagged) ? ["Flagged"] : [];
  return outputs.length > 1 ? [...flagged, `${outputs.length} images`] : flagged;
}

function skeleton() {
  return element("li", { class: "card skeleton", "aria-hidden": "true" });
}

function matchesFilter(job, filter) {
  const { task, states } = FILTERS[filter];
  return (!task || job.task === task) && states.includes(job.state);
}
