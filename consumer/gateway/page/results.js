/** The gallery: jobs that have ended, newest first, in pages. */

import { listJobs } from "./api.js";
import { byId, element, icon, iconButton } from "./dom.js";
import { Job, compareTimes } from "./jobs.js";
import { hideNotice, showNotice } from "./notices.js";
import { downloadLink, outputImage } from "./outputs.js";
import { copyButton, facts } from "./result_text.js";
import { shortened, when } from "./words.js";

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
  "": "No results yet. What you draw or ask appears here.",
  images: "No images yet.",
  answers: "No answers yet.",
  failed: "Nothing has failed.",
  cancelled: "Nothing was cancelled.",
};

export class Results {
  #jobs = new Map();
  #cards = new Map();
  #list = byId("gallery");
  #cursor = null;
  #loaded = false; // whether the first page has come
  #round = 0; // counts the filters chosen; an answer for an earlier one is dropped
  #actions;

  /**
   * @param {Object} actions
   * @param {(job: Job, number: number) => void} actions.open Called with a job and an output's number.
   * @param {(job: Job, output: Object) => void} actions.ask
   * @param {(job: Job) => void} actions.use
   */
  constructor(actions) {
    this.#actions = actions;
    byId("filter").addEventListener("change", () => this.load());
    byId("more").addEventListener("click", () => this.#page());
  }

  /** All jobs shown, in their order. */
  get all() {
    return [...this.#jobs.values()].sort((a, b) => compareTimes(b, a) || (a.id < b.id ? 1 : -1));
  }

  /** Load the first page, if it could not be loaded before. */
  loadMissing() {
    if (!this.#loaded) this.load();
  }

  /** Load the first page anew. */
  async load() {
    this.#round += 1;
    this.#loaded = false;
    this.#jobs.clear();
    this.#cards.clear();
    this.#cursor = null;
    this.#list.replaceChildren(...Array.from({ length: SKELETONS }, skeleton));
    byId("gallery-empty").hidden = true;
    await this.#page();
  }

  /** Show a job that has just ended, where the filter lets it through. */
  add(job) {
    if (this.#jobs.has(job.id) || !passes(job, byId("filter").value)) return;
    if (this.#list.getAttribute("aria-busy") === "true") return; // the page to come has it
    this.#insert(job);
    this.#showEnd();
  }

  async #page() {
    const round = this.#round;
    const query = { limit: PAGE, ...FILTERS[byId("filter").value] };
    if (this.#cursor) query.after = this.#cursor;
    this.#list.setAttribute("aria-busy", "true");
    byId("more").setAttribute("aria-disabled", "true");
    let page;
    try {
      page = await listJobs(query);
    } catch (error) {
      if (round === this.#round) this.#failed(error);
      return;
    }
    if (round !== this.#round) return;
    this.#take(page);
  }

  #take(page) {
    this.#loaded = true;
    hideNotice("results");
    this.#list.querySelectorAll(".skeleton").forEach((card) => card.remove());
    this.#list.setAttribute("aria-busy", "false");
    this.#cursor = page.has_more ? page.next : null;
    const ended = page.data.map((doc) => new Job(doc)).filter((job) => job.ended);
    const first = ended.filter((job) => !this.#jobs.has(job.id)).map((job) => this.#insert(job))[0];
    if (document.activeElement === byId("more")) first?.querySelector("button")?.focus();
    if (!first && this.#cursor) return this.#page(); // a page may be empty and not the last one
    this.#showEnd();
  }

  #failed(error) {
    this.#list.setAttribute("aria-busy", "false");
    this.#list.querySelectorAll(".skeleton").forEach((card) => card.remove());
    byId("more").removeAttribute("aria-disabled");
    if (!this.#jobs.size) this.#showEmpty("Results are shown once they can be loaded.");
    if (error.status === 401 || error.status === 403 || error.unreachable) return; // the feed says it
    const retry = {
      label: "Try again",
      onClick: () => (this.#jobs.size ? this.#page() : this.load()),
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
    const label = `Details: ${[shortened(job.title, 120), ...badges].join(", ")}`;
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
      this.#words(job),
      element(
        "div",
        { class: "card-actions" },
        iconButton("ask", "Ask about this image", () => this.#actions.ask(job, outputs[0])),
        iconButton("reuse", "Use these parameters again", () => this.#actions.use(job)),
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
        this.#words(job),
        element("p", { class: "answer" }, job.answer ?? ""),
      ),
      element(
        "div",
        { class: "card-actions" },
        iconButton("info", "Details", () => this.#actions.open(job, 0)),
        iconButton("reuse", "Use these parameters again", () => this.#actions.use(job)),
        copyButton(job.answer ?? ""),
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
        this.#words(job),
        failed ? element("p", { class: "problem" }, job.problem) : null,
      ),
      element(
        "div",
        { class: "card-actions" },
        iconButton("info", "Details", () => this.#actions.open(job, 0)),
        job.asked.prompt
          ? iconButton("reuse", "Use these parameters again", () => this.#actions.use(job))
          : null,
      ),
    ];
  }

  #words(job) {
    const time = element("time", { datetime: job.time }, when(job.time));
    return element(
      "div",
      { class: "card-words" },
      element("h3", { class: "card-title" }, shortened(job.title, 160)),
      element("p", { class: "hint" }, time, ...facts(job).map((fact) => element("span", {}, fact))),
    );
  }
}

/** The images that a question was about, as far as they are known. */
export function sources(job) {
  const { thumbnails, images } = job.asked;
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

function passes(job, filter) {
  const { task, states } = FILTERS[filter];
  return (!task || job.task === task) && states.includes(job.state);
}
