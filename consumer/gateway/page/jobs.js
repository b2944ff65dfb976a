/** The jobs that the page knows, and what their events change. */

import { readMetadata } from "./metadata.js";
import { recall, remember } from "./session.js";
import { sentence } from "./words.js";

const SENT = "sent";
const SENT_KEPT = 40; // requests of this tab whose content is kept for a reload

/** One job; its fields are those of the API's job document, with what its events have added. */
export class Job {
  /** @param {Object} doc The API's job document. */
  constructor(doc) {
    Object.assign(this, { id: doc.id, task: doc.task, state: "queued", created: null });
    Object.assign(this, { position: null, estimatedStart: null, progress: null });
    Object.assign(this, { attempt: 0, sequence: -1, text: "", textBroken: false, preview: null });
    Object.assign(this, { result: null, error: null, metadata: {}, cancelling: false });
    this.heardAt = -Infinity; // when the last event came
    this.update(doc, 0);
  }

  get ended() {
    return this.state !== "queued" && this.state !== "running";
  }

  /** What was asked, as far as this tab or the job's metadata says. */
  get asked() {
    const sent = sentContent(this.id);
    const { prompt, negativePrompt, images } = readMetadata(this.metadata);
    return {
      prompt: sent?.request.prompt ?? prompt,
      negativePrompt: sent?.request.negative_prompt ?? negativePrompt,
      request: sent?.request,
      thumbnails: sent?.thumbnails ?? [],
      images,
    };
  }

  /** What to call the job. */
  get title() {
    const kind = this.task === "image_to_text" ? "Question" : "Drawing";
    return this.asked.prompt ?? `${kind} (request …${this.id.slice(-8)})`;
  }

  get outputs() {
    return this.result?.outputs ?? [];
  }

  get imageOutputs() {
    return this.outputs.flatMap((output, number) =>
      output.kind === "image" ? [{ ...output, number }] : [],
    );
  }

  /** The generated text; undefined where there is none. */
  get answer() {
    return this.outputs.find((output) => output.kind === "text")?.text;
  }

  /** When it was submitted, else when it ended; RFC 3339. */
  get time() {
    return this.created ?? this.result?.time ?? null;
  }

  /** Why it failed, as a sentence. */
  get problem() {
    const failure = this.result?.failure;
    const message = this.error?.message ?? failure?.message;
    const param = this.error?.param ?? failure?.details?.parameter ?? null;
    return message ? sentence(message, param) : "The request has failed.";
  }

  /**
   * Take over a job document, unless an event has come since the server was asked for it.
   *
   * @param {Object} doc
   * @param {number} asOf When the server was asked, on the clock of `performance.now`.
   */
  update(doc, asOf) {
    if (this.heardAt > asOf && ["queued", "running"].includes(doc.state)) return;
    this.state = doc.state;
    this.created = doc.created ?? this.created;
    this.position = doc.position ?? null;
    this.estimatedStart = doc.estimated_start ?? null;
    this.progress = doc.progress ?? null;
    this.result = doc.result ?? this.result;
    this.error = doc.error ?? this.error;
    this.metadata = doc.metadata ?? this.result?.metadata ?? this.metadata;
  }

  /**
   * Take over an event of the job's stream.
   *
   * @param {string} type
   * @param {Object} data
   * @returns {boolean} Whether it is the last.
   */
  apply(type, data) {
    this.heardAt = performance.now();
    if (type === "queued") {
      if (this.state === "queued") {
        this.position = data.position ?? null;
        this.estimatedStart = data.estimated_start ?? null;
      }
      return false;
    }
    if (data.metadata && Object.keys(data.metadata).length) this.metadata = data.metadata;
    if (type === "succeeded" || type === "failed" || type === "cancelled") {
      Object.assign(this, { state: type, result: data, position: null, progress: null });
      return true;
    }
    this.#apply(type, data);
    return false;
  }

  #apply(type, data) {
    if (this.ended || data.attempt < this.attempt) return;
    if (data.attempt > this.attempt) {
      Object.assign(this, { attempt: data.attempt, sequence: -1, preview: null });
      Object.assign(this, { text: "", textBroken: false, progress: null });
    }
    if (data.sequence <= this.sequence) return; // seen before the stream broke off
    const missed = data.sequence > this.sequence + 1;
    this.sequence = data.sequence;
    Object.assign(this, { state: "running", position: null, estimatedStart: null });
    if (type !== "progress") return;
    this.progress = { step: data.step, of: data.of, eta: data.eta ?? null };
    if (data.preview) this.preview = data.preview;
    if (data.step === 0) this.text = "";
    if (data.text) {
      if (missed && data.step > 0) this.textBroken = true;
      this.text += data.text;
    }
  }
}

function sentContent(id) {
  return (recall(SENT) ?? {})[id];
}

/**
 * Keep what this tab has sent: the history shows it, and it can be used again after a reload.
 *
 * @param {string} id
 * @param {Object} request Without the content of its images.
 * @param {string[]} thumbnails Of its images, small data URLs.
 */
export function keepSent(id, request, thumbnails) {
  const kept = Object.entries(recall(SENT) ?? {}).filter(([other]) => other !== id);
  remember(SENT, Object.fromEntries([...kept.slice(1 - SENT_KEPT), [id, { request, thumbnails }]]));
}

/** Jobs that wait or run. Views listen to its `change` events. */
export class ActiveJobs extends EventTarget {
  #jobs = new Map();
  #ended = new Set(); // ids; an answer that was under way for long must not revive them

  /** Those that run first, then those that wait, the next one first. */
  get all() {
    const rank = (job) =>
      job.state === "running" ? -1 : (job.position ?? Number.MAX_SAFE_INTEGER);
    return [...this.#jobs.values()].sort((a, b) => rank(a) - rank(b) || compareTimes(a, b));
  }

  get size() {
    return this.#jobs.size;
  }

  get(id) {
    return this.#jobs.get(id);
  }

  /**
   * Take over a job document.
   *
   * @param {Object} doc
   * @param {number} asOf When the server was asked, on the clock of `performance.now`.
   * @returns {Job|null} The job, if it waits or runs or has just ended.
   */
  update(doc, asOf = performance.now()) {
    const known = this.#jobs.get(doc.id);
    if (!known && (this.#ended.has(doc.id) || !["queued", "running"].includes(doc.state)))
      return null;
    const job = known ?? new Job(doc);
    const before = job.state;
    job.update(doc, asOf);
    this.#jobs.set(job.id, job);
    this.changed(job, known ? before : null);
    return job;
  }

  /** Report that a job has changed; those that have ended leave. @param {string|null} before State. */
  changed(job, before) {
    if (job.ended) {
      this.#jobs.delete(job.id);
      this.#ended.add(job.id);
    }
    this.dispatchEvent(new CustomEvent("change", { detail: { job, before } }));
  }

  /** Drop a job that the server no longer knows. */
  forget(id) {
    this.#jobs.delete(id);
    this.dispatchEvent(new CustomEvent("change", { detail: { job: null, before: null } }));
  }

  clear() {
    this.#jobs.clear();
    this.#ended.clear();
    this.dispatchEvent(new CustomEvent("change", { detail: { job: null, before: null } }));
  }
}

/** Older first; those without a time last. */
export function compareTimes(a, b) {
  const [left, right] = [a, b].map((job) =>
    job.time ? Date.parse(job.time) : Number.MAX_SAFE_INTEGER,
  );
  return left - right;
}
