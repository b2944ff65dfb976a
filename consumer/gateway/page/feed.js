/**
 * Keeps the active jobs in sync with the server.
 *
 * The page follows the event streams of at most two jobs: a browser opens six connections to one
 * server over HTTP/1.1, and all tabs share them. The page polls the other jobs in lists.
 */

import { ApiError, eventsPath, getJob, getQueue, listJobs } from "./api.js";
import { Job } from "./jobs.js";
import { backoff, follow, pause } from "./sse.js";

const MAX_STREAMS = 2;
const ACTIVE_INTERVAL = 2_500; // milliseconds between two polls while jobs are active
const IDLE_INTERVAL = 10_000; // milliseconds; other clients may submit jobs
const HIDDEN_INTERVAL = 30_000; // milliseconds, for a tab in the background
const NEWEST_LIMIT = 20; // jobs in the list that each poll reads
const LIST_LIMIT = 100; // jobs in one list of active jobs
const SINGLE_LIMIT = 5; // jobs that one poll reads individually

export class Feed {
  #active;
  #streams = new Map(); // AbortController by job id
  #running = new AbortController();
  #sleep = new AbortController();
  #callbacks;
  #complete = false; // whether the page has read the list of all active jobs

  /**
   * @param {import("./jobs.js").ActiveJobs} active
   * @param {Object} callbacks
   * @param {(state: "connected"|"offline"|"refused", error?: ApiError) => void} callbacks.onConnection
   * @param {(job: Job) => void} callbacks.onEnded Called with ended jobs, repeatedly for one job.
   * @param {(queue: Object) => void} callbacks.onQueue
   * @param {(event: Object) => void} callbacks.onStarted Called with each started event.
   */
  constructor(active, callbacks) {
    this.#active = active;
    this.#callbacks = callbacks;
    document.addEventListener("visibilitychange", () => this.#onVisibility());
  }

  /** Start, or restart with another API key or after a refusal. */
  start() {
    this.stop();
    this.#running = new AbortController();
    this.#poll(this.#running.signal);
  }

  /** Stop all streams and polls. */
  stop() {
    this.#running.abort();
    this.#closeStreams();
    this.#complete = false;
  }

  /** Poll now. */
  wake() {
    this.#sleep.abort();
  }

  /** Open the event streams of the first jobs, and close all others. */
  assign() {
    if (this.#running.signal.aborted || document.hidden) return;
    const ids = this.#active.all.slice(0, MAX_STREAMS).map((job) => job.id);
    for (const [id, stream] of this.#streams) {
      if (!ids.includes(id)) {
        stream.abort();
        this.#streams.delete(id);
      }
    }
    for (const id of ids) if (!this.#streams.has(id)) this.#follow(id);
  }

  #onVisibility() {
    if (document.hidden) this.#closeStreams();
    else this.wake();
    this.assign();
  }

  // Tabs in the background leave the connections to the tab in the foreground.
  #closeStreams() {
    for (const stream of this.#streams.values()) stream.abort();
    this.#streams.clear();
  }

  async #poll(signal) {
    let failures = 0;
    while (!signal.aborted) {
      let wait = 0;
      try {
        await this.#refresh(signal);
        failures = 0;
        wait = this.#interval;
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        if (signal.aborted) return;
        if (error.status === 401 || error.status === 403) return this.#refused(error);
        failures += 1;
        wait = Math.max(backoff(failures), (error.retryAfter ?? 0) * 1_000);
        if (error.status !== 429) this.#callbacks.onConnection("offline", error);
      }
      this.#sleep = new AbortController();
      await pause(wait, AbortSignal.any([signal, this.#sleep.signal]));
    }
  }

  get #interval() {
    if (this.#active.size) return document.hidden ? IDLE_INTERVAL : ACTIVE_INTERVAL;
    return document.hidden ? HIDDEN_INTERVAL : IDLE_INTERVAL;
  }

  #refused(error) {
    this.stop();
    this.#callbacks.onConnection("refused", error);
  }

  async #refresh(signal) {
    const listed = new Set();
    const missing = () =>
      this.#active.all.filter((job) => !listed.has(job.id) && !this.#streams.has(job.id));
    const query = async (send) => {
      const requestedAt = performance.now();
      const response = await send();
      if (signal.aborted) throw new ApiError("", { code: "stopped" });
      return [response, requestedAt];
    };
    const [newest, requestedAt] = await query(() => listJobs({ limit: NEWEST_LIMIT }));
    this.#callbacks.onConnection("connected");
    this.#update(newest.data, requestedAt, listed);
    if (newest.has_more && (missing().length || !this.#complete)) {
      const [list, requestedAt] = await query(() =>
        listJobs({ states: ["queued", "running"], limit: LIST_LIMIT }),
      );
      this.#update(list.data, requestedAt, listed);
    }
    this.#complete = true;
    for (const { id } of missing().slice(0, SINGLE_LIMIT)) {
      const [doc, requestedAt] = await query(() => this.#findJob(id));
      if (doc) this.#update([doc], requestedAt, listed);
    }
    const [queue] = await query(getQueue);
    this.#callbacks.onQueue(queue);
  }

  async #findJob(id) {
    try {
      return await getJob(id);
    } catch (error) {
      if (error.status !== 404) throw error;
      this.#active.remove(id); // its result has expired
      return null;
    }
  }

  #update(docs, requestedAt, listed) {
    for (const doc of docs) {
      listed.add(doc.id);
      const job = this.#active.update(doc, requestedAt);
      if (job === null || job.ended) this.#callbacks.onEnded(job ?? new Job(doc));
    }
    this.assign();
  }

  async #follow(id) {
    const stream = new AbortController();
    this.#streams.set(id, stream);
    try {
      await follow(eventsPath(id), {
        signal: stream.signal,
        onEvent: (event) => this.#onEvent(id, event),
        onBroken: (broken) => this.#callbacks.onConnection(broken ? "offline" : "connected"),
      });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401 || error.status === 403) this.#refused(error);
    }
    if (this.#streams.get(id) === stream) this.#streams.delete(id);
    if (!stream.signal.aborted) this.wake(); // to read the final state and to follow the next job
  }

  #onEvent(id, { event, data }) {
    const job = this.#active.get(id);
    if (!job) return true;
    const body = JSON.parse(data);
    const before = job.state;
    const last = job.apply(event, body);
    if (event === "started") this.#callbacks.onStarted(body);
    this.#active.changed(job, before);
    if (last) this.#callbacks.onEnded(job);
    return last;
  }
}
