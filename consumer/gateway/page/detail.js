/** The dialog with the details of one result. */

import { byId, element, icon, iconButton } from "./dom.js";
import { downloadLink, outputImage } from "./outputs.js";
import { copyButton, details } from "./result_text.js";
import { sources } from "./results.js";
import { truncate } from "./format.js";

export class Detail {
  #dialog = byId("detail");
  #results;
  #actions;
  #job = null;
  #number = 0;

  /**
   * @param {import("./results.js").Results} results
   * @param {Object} actions The `ask` and `use` callbacks of the results.
   */
  constructor(results, actions) {
    this.#results = results;
    this.#actions = actions;
    this.#dialog.addEventListener("keydown", (event) => this.#onKey(event));
    this.#dialog.addEventListener("click", (event) => {
      if (event.target === this.#dialog) this.#dialog.close(); // a click outside the content
    });
    this.#dialog.addEventListener("close", () => {
      this.#job = null;
      this.#dialog.replaceChildren();
      this.#dialog.removeAttribute("aria-labelledby");
    });
  }

  /**
   * Open the dialog.
   *
   * @param {import("./jobs.js").Job} job
   * @param {number} number Number of the output.
   */
  open(job, number) {
    this.#job = job;
    this.#number = number;
    this.#draw();
    if (!this.#dialog.open) this.#dialog.showModal();
  }

  get #output() {
    return this.#job.imageOutputs.find(({ number }) => number === this.#number);
  }

  #onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowLeft") this.#go(-1);
    if (event.key === "ArrowRight") this.#go(1);
  }

  #neighbour(step) {
    const jobs = this.#results.all;
    const index = jobs.findIndex((job) => job.id === this.#job.id);
    return index < 0 ? undefined : jobs[index + step];
  }

  #go(step) {
    const job = this.#neighbour(step);
    if (!job) return;
    const label = document.activeElement?.getAttribute("aria-label");
    this.open(job, job.imageOutputs[0]?.number ?? 0);
    const buttons = [...this.#dialog.querySelectorAll("button")];
    (
      buttons.find((button) => button.getAttribute("aria-label") === label && !button.disabled) ??
      buttons[0]
    ).focus();
  }

  #draw() {
    const title = element("h2", { id: "detail-title" }, truncate(this.#job.title, 400));
    const stage = this.#output ? this.#stage() : null;
    const side = element(
      "div",
      { class: "detail-side" },
      title,
      ...this.#text(),
      this.#buttons(),
      this.#table(),
    );
    this.#dialog.replaceChildren(
      this.#bar(),
      element("div", { class: "detail-content" }, stage, side),
    );
    this.#dialog.setAttribute("aria-labelledby", title.id);
    this.#dialog.classList.toggle("with-image", Boolean(stage));
  }

  #bar() {
    const move = (name, label, step) => {
      const button = iconButton(name, label, () => this.#go(step));
      button.disabled = !this.#neighbour(step);
      return button;
    };
    return element(
      "div",
      { class: "detail-bar" },
      move("back", "Newer result", -1),
      move("next", "Older result", 1),
      iconButton("close", "Close", () => this.#dialog.close()),
    );
  }

  #stage() {
    const job = this.#job;
    const outputs = job.imageOutputs;
    const alt = `${truncate(job.title, 200)}${outputs.length > 1 ? `, image ${outputs.indexOf(this.#output) + 1}` : ""}`;
    const large = outputImage(job.id, this.#output, alt);
    const show = this.#output.flagged ? showButton(large) : null;
    if (outputs.length === 1) return element("div", { class: "stage" }, large, show);
    const strip = outputs.map((output, index) => {
      const current = output.number === this.#number;
      const attributes = {
        type: "button",
        "aria-label": `Image ${index + 1}`,
        "aria-current": current ? "true" : null,
      };
      const choose = () => {
        this.open(job, output.number);
        this.#dialog.querySelector(".strip [aria-current]").focus();
      };
      return element(
        "button",
        { ...attributes, on: { click: choose } },
        outputImage(job.id, output, ""),
      );
    });
    return element(
      "div",
      { class: "stage" },
      large,
      show,
      element("div", { class: "strip" }, ...strip),
    );
  }

  #text() {
    const job = this.#job;
    const output = this.#output;
    const warnings = (job.result?.warnings ?? []).map((text) =>
      element("p", { class: "warning" }, icon("info"), text),
    );
    return [
      sources(job),
      job.answer === undefined ? null : element("p", { class: "answer whole" }, job.answer),
      job.state === "failed" ? element("p", { class: "problem" }, job.problem) : null,
      job.state === "cancelled"
        ? element("p", { class: "hint" }, "This request was cancelled.")
        : null,
      output?.flagged
        ? element(
            "p",
            { class: "warning" },
            icon("alert"),
            "The safety checker flagged this image.",
          )
        : null,
      ...warnings,
    ];
  }

  #buttons() {
    const job = this.#job;
    const output = this.#output;
    const closing = (action) => () => {
      this.#dialog.close();
      action();
    };
    const button = (name, label, action) =>
      element(
        "button",
        { type: "button", class: "button quiet", on: { click: closing(action) } },
        icon(name),
        label,
      );
    return element(
      "div",
      { class: "detail-buttons" },
      output
        ? downloadLink(job, output, { class: "button primary" }, icon("download"), "Download")
        : null,
      output ? button("ask", "Ask about this image", () => this.#actions.ask(job, output)) : null,
      job.input.prompt && job.reusable
        ? button("reuse", "Use these parameters again", () => this.#actions.use(job))
        : null,
      job.answer ? copyButton(job.answer) : null,
    );
  }

  #table() {
    const rows = details(this.#job, this.#output).map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value)),
    );
    return element("dl", { class: "facts" }, ...rows);
  }
}

function showButton(frame) {
  const show = () => {
    delete frame.dataset.flagged;
    button.remove();
  };
  const button = element(
    "button",
    { type: "button", class: "button quiet stage-note", on: { click: show } },
    "Show the image",
  );
  return button;
}
