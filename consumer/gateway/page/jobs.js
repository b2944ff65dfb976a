/** The state of jobs, and how their events change it. */

import { readMetadata } from "./metadata.js";
import { loadValue, storeValue } from "./session.js";
import { sentence } from "./format.js";

const SENT = "sent";
const SENT_LIMIT = 40; // requests that the tab stores for a reload
const KINDS = { text_to_image: "Drawing", image_to_text: "Question" }; // the tasks of the form

/** One job: the fields of the API's job document, and the state from its events. */
export class Job {
  /** @param {Object} doc The API's job document. */
  constructor(doc) {
    Object.assign(this, { id: doc.id, task: doc.task, queue: doc.queue, state: "queued", created: null });
    Object.assign(this, { position: null, estimatedStart: null, progress: null });
    Object.assign(this, { attempt: 0, sequence: -1, text: "", textBroken: false, preview: null });
    Object.assign(this, { result: null, error: null, metadata: {}, cancelling: false });
    this.lastEventAt = -Infinity; // time of the last event, on the clock of `performance.now`
    this.update(doc, 0);
  }

  get ended() {
    return this.state !== "queued" && this.state !== "running";
  }

  /** The input of the job, from the storage of this tab or from the job's metadata. */
  get input() {
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

  /** Title of the job. */
  get title() {
    return this.input.prompt ?? `${KINDS[this.task] ?? "Job"} (request …${this.id.slice(-8)})`;
  }

  /** Whether the form can show the parameters: it has no fields for custom runners. */
  get reusable() {
    return this.task in KINDS;
  }

  get outputs() {
    return this.result?.outputs ?? [];
  }

  get imageOutputs() {
    return this.outputs.flatMap((output, number) =>
      output.kind === "image" ? [{ ...output, number }] : [],
    );
  }

  /** The files that are no images. */
  get fileOutputs() {
    return this.outputs.flatMap((output, number) =>
      output.kind === "file" ? [{ ...output, number }] : [],
    );
  }

  /** The generated text, or the values as JSON; undefined without both. */
  get answer() {
    const texts = this.outputs.flatMap(({ kind, text, value }) => {
      if (kind === "text") return [text];
      return kind === "json" ? [JSON.stringify(value, null, 2)] : [];
    });
    return texts.length ? texts.join("\n") : undefined;
  }

  /** Time of the submission, otherwise of the end; RFC 3339. */
  get time() {
    return this.created ?? this.result?.time ?? null;
  }

  /** The reason of the failure, as a sentence. */
  get problem() {
    const failure = this.result?.failure;
    const message = this.error?.message ?? failure?.message;
    const param = this.error?.param ?? failure?.details?.parameter ?? null;
    return message ? sentence(message, param) : "The request failed.";
  }

  /**
   * Apply a job document, unless an event arrived after the page requested the document.
   *
   * @param {Object} doc
   * @param {number} requestedAt Time of the request, on the clock of `performance.now`.
   */
  update(doc, requestedAt) {
    if (this.lastEventAt > requestedAt && ["queued", "running"].includes(doc.state)) return;
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
   * Apply an event of the job's stream.
   *
   * @param {string} type
   * @param {Object} data
   * @returns {boolean} Whether the event is the last.
   */
  apply(type, data) {
    this.lastEventAt = performance.now();
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
    if (data.sequence <= this.sequence) return; // a repeated event after a reconnect
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
  return (loadValue(SENT) ?? {})[id];
}

/**
 * Store a request of this tab, so that the history can show and reuse it after a reload.
 *
 * @param {string} id
 * @param {Object} request The request without the content of its images.
 * @param {string[]} thumbnails Thumbnails of its images, as data URLs.
 */
export function storeSent(id, request, thumbnails) {
  const stored = Object.entries(loadValue(SENT) ?? {}).filter(([other]) => other !== id);
  const latest = stored.slice(1 - SENT_LIMIT);
  storeValue(SENT, Object.fromEntries([...latest, [id, { request, thumbnails }]]));
}

/** The waiting and running jobs. Dispatches `change` events for the views. */
export class ActiveJobs extends EventTarget {
  #jobs = new Map();
  #ended = new Set(); // ids; a delayed response must not add these jobs again

  /** Running jobs first, then waiting jobs in queue order. */
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
   * Apply a job document.
   *
   * @param {Object} doc
   * @param {number} requestedAt Time of the request, on the clock of `performance.now`.
   * @returns {Job|null} The job if it waits, runs or has just ended.
   */
  update(doc, requestedAt = performance.now()) {
    const known = this.#jobs.get(doc.id);
    if (!known && (this.#ended.has(doc.id) || !["queued", "running"].includes(doc.state)))
      return null;
    const job = known ?? new Job(doc);
    const before = job.state;
    job.update(doc, requestedAt);
    this.#jobs.set(job.id, job);
    this.changed(job, known ? before : null);
    return job;
  }

  /** Report a change of a job, and remove an ended job. @param {string|null} before Earlier state. */
  changed(job, before) {
    if (job.ended) {
      this.#jobs.delete(job.id);
      this.#ended.add(job.id);
    }
    this.dispatchEvent(new CustomEvent("change", { detail: { job, before } }));
  }

  /** Remove a job that the server no longer stores. */
  remove(id) {
    this.#jobs.delete(id);
    this.dispatchEvent(new CustomEvent("change", { detail: { job: null, before: null } }));
  }

  clear() {
    this.#jobs.clear();
    this.#ended.clear();
    this.dispatchEvent(new CustomEvent("change", { detail: { job: null, before: null } }));
  }
}

/** Compare two jobs: older ones first, those without a time last. */
export function compareTimes(a, b) {
  const [left, right] = [a, b].map((job) =>
    job.time ? Date.parse(job.time) : Number.MAX_SAFE_INTEGER,
  );
  return left - right;
}
