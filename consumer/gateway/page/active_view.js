/** The list of waiting and running jobs. */

import { announce } from "./announce.js";
import { ApiError, cancelJob } from "./api.js";
import { byId, element, icon, setText } from "./dom.js";
import { hideNotice, showNotice } from "./notices.js";
import { approximateDuration, formatDuration, pluralize, sentence, truncate } from "./format.js";

const BASE64 = /^[A-Za-z0-9+/]+={0,2}$/;

export class ActiveView {
  #jobs;
  #rows = new Map(); // rows by job id
  #list = byId("active");
  #drawScheduled = false;
  #loaded = false;

  /** @param {import("./jobs.js").ActiveJobs} jobs */
  constructor(jobs) {
    this.#jobs = jobs;
    jobs.addEventListener("change", ({ detail: { job, before } }) => {
      if (job) this.#announce(job, before);
      this.#scheduleDraw();
    });
  }

  /** Allow the text for an empty list: the first job list has arrived. */
  setLoaded() {
    this.#loaded = true;
    this.#scheduleDraw();
  }

  /** Show how many jobs wait and run. @param {{queues: Object[]}} queue */
  showQueue({ queues }) {
    setText(byId("queue"), queues.map(queueText).filter(Boolean).join(" · "));
  }

  // Many events may arrive between two frames. One draw covers them all.
  #scheduleDraw() {
    if (this.#drawScheduled) return;
    this.#drawScheduled = true;
    requestAnimationFrame(() => {
      this.#drawScheduled = false;
      this.#draw();
    });
  }

  #draw() {
    const jobs = this.#jobs.all;
    const ids = new Set(jobs.map((job) => job.id));
    for (const [id, row] of this.#rows) if (!ids.has(id)) this.#remove(id, row);
    jobs.forEach((job, index) => {
      if (!this.#rows.has(job.id)) this.#rows.set(job.id, new Row(job));
      const row = this.#rows.get(job.id);
      row.draw();
      this.#insertAt(row.node, index);
    });
    byId("active-empty").hidden = jobs.length > 0 || !this.#loaded;
    const running = jobs.filter((job) => job.state === "running").length;
    document.title = jobs.length
      ? `${running ? "● " : ""}${jobs.length} in progress – Generation`
      : "Generation";
  }

  #insertAt(node, index) {
    if (this.#list.children[index] === node) return;
    const focused = node.contains(document.activeElement) ? document.activeElement : null;
    this.#list.insertBefore(node, this.#list.children[index] ?? null);
    focused?.focus(); // an element loses the focus when it moves
  }

  #remove(id, row) {
    const hadFocus = row.node.contains(document.activeElement);
    row.node.remove();
    this.#rows.delete(id);
    if (hadFocus) byId("active-title").focus();
  }

  #announce(job, before) {
    if (job.state === before) return;
    const title = truncate(job.title, 60);
    if (job.state === "running") announce(`Started: ${title}.`);
    if (job.state === "succeeded")
      announce(job.answer ? `Answer: ${truncate(job.answer, 300)}` : `Done: ${title}.`);
    if (job.state === "failed") announce(`Failed: ${title}. ${job.problem}`);
    if (job.state === "cancelled") announce(`Cancelled: ${title}.`);
  }
}

class Row {
  #job;
  #preview = element("img", { alt: "", hidden: true });
  #image = element("div", { class: "job-image" }, icon("image"), this.#preview);
  #title = element("h3", { class: "job-title" });
  #status = element("p", { class: "job-status" });
  #bar = element("progress", { hidden: true });
  #text = element("p", { class: "job-text", hidden: true });
  #cancel = element(
    "button",
    { type: "button", class: "button quiet", on: { click: () => this.#onCancel() } },
    "Cancel",
  );

  constructor(job) {
    this.#job = job;
    if (job.task === "image_to_text") {
      const [thumbnail] = job.input.thumbnails;
      if (thumbnail) this.#preview.src = thumbnail;
      this.#preview.hidden = !thumbnail;
      this.#image.querySelector("use").setAttribute("href", "#icon-ask");
    }
    this.node = element(
      "li",
      { class: "job" },
      this.#image,
      element("div", { class: "job-body" }, this.#title, this.#status, this.#bar, this.#text),
      element("div", { class: "job-actions" }, this.#cancel),
    );
  }

  draw() {
    const job = this.#job;
    this.node.dataset.state = job.state;
    this.node.dataset.task = job.task;
    setText(this.#title, truncate(job.title, 240));
    setText(this.#status, job.cancelling ? "Cancelling…" : statusText(job));
    setText(this.#text, (job.textBroken ? "… " : "") + job.text);
    this.#text.hidden = !job.text;
    this.#drawBar();
    this.#drawPreview();
    const label = `Cancel ${truncate(job.title, 60)}`;
    if (this.#cancel.getAttribute("aria-label") !== label)
      this.#cancel.setAttribute("aria-label", label);
    this.#cancel.setAttribute("aria-disabled", String(job.cancelling));
  }

  #drawBar() {
    const { state, progress, task, title } = this.#job;
    this.#bar.hidden = state !== "running";
    this.#bar.setAttribute("aria-label", `Progress of ${truncate(title, 60)}`);
    // A text usually ends before the token limit, so the limit does not measure progress.
    if (progress && task === "text_to_image") {
      this.#bar.max = progress.of;
      this.#bar.value = progress.step;
    } else {
      this.#bar.removeAttribute("value");
    }
  }

  #drawPreview() {
    const { preview, task, title } = this.#job;
    if (task !== "text_to_image") return;
    if (preview && BASE64.test(preview)) {
      const url = `data:image/jpeg;base64,${preview}`;
      if (this.#preview.src !== url) this.#preview.src = url;
      this.#preview.alt = `Preview of ${truncate(title, 60)}`;
    }
    this.#preview.hidden = !preview;
  }

  async #onCancel() {
    const job = this.#job;
    if (job.cancelling) return;
    job.cancelling = true;
    hideNotice("cancel");
    this.draw();
    try {
      await cancelJob(job.id);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      job.cancelling = false;
      this.draw();
      if (error.status !== 409)
        showNotice("cancel", `The request was not cancelled. ${error.message}`);
    }
    this.node.dispatchEvent(new Event("cancelled", { bubbles: true })); // triggers a new poll
  }
}

function statusText({ state, task, position, estimatedStart, progress }) {
  if (state === "running") return runningText(task, progress);
  const parts = [
    position === null
      ? "Waiting"
      : position === 0
        ? "Next in the queue"
        : `${pluralize(position, "request")} ahead`,
  ];
  if (estimatedStart) {
    const seconds = (Date.parse(estimatedStart) - Date.now()) / 1_000;
    parts.push(seconds > 0 ? `starts in ${approximateDuration(seconds)}` : "starts soon");
  }
  return parts.join(", ");
}

function runningText(task, progress) {
  if (!progress) return "Running";
  const { step, of, eta } = progress;
  if (task === "image_to_text") return `Writing, ${pluralize(step, "token")}`;
  if (step >= of) return "Saving the image";
  return `Step ${step} of ${of}${eta ? `, ${approximateDuration(eta)} left` : ""}`;
}

const TASKS = { text_to_image: "Drawing", image_to_text: "Questions" };

function queueText({ queue, waiting, running, pace_seconds: pace }) {
  if (!waiting && !running) return "";
  const each = pace ? `, ${formatDuration(pace)} each` : "";
  return sentence(`${TASKS[queue] ?? queue}: ${running} running, ${waiting} waiting${each}`).slice(
    0,
    -1,
  );
}
