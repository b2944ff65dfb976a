/** Client of the gateway's jobs API. */

import { apiKey } from "./session.js";
import { sentence } from "./format.js";

const TIMEOUT = 30_000; // milliseconds

// Relative to the page, because a proxy may serve the page under a prefix.
const base = new URL(".", document.baseURI);

/** An error response, or a missing response. The message is a sentence for the user. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, code?: string, param?: string|null, retryAfter?: number|null}} details
   *   A status of 0 means that there was no response.
   */
  constructor(message, { status = 0, code = "", param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }

  get unreachable() {
    return this.status === 0 || this.status === 502 || this.status === 503 || this.status === 504;
  }
}

/**
 * Send a request with the API key.
 *
 * @param {string} path Relative to the page.
 * @param {{method?: string, body?: string, headers?: Object, signal?: AbortSignal, timeout?: number}}
 *   options A timeout of 0 means no timeout.
 * @returns {Promise<Response>} A response with a success status.
 * @throws {ApiError}
 */
export async function send(path, options = {}) {
  const { method = "GET", body, headers = {}, signal, timeout = TIMEOUT } = options;
  const all = new Headers(headers);
  if (apiKey()) all.set("Authorization", `Bearer ${apiKey()}`);
  if (body !== undefined) all.set("Content-Type", "application/json");
  const signals = [signal, timeout ? AbortSignal.timeout(timeout) : null].filter(Boolean);
  let response;
  try {
    response = await fetch(new URL(path, base), {
      method,
      body,
      headers: all,
      cache: "no-store",
      signal: AbortSignal.any(signals),
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The gateway cannot be reached.", { code: "unreachable" });
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const details = { status: response.status, retryAfter: Number.isNaN(seconds) ? null : seconds };
  let error = null;
  try {
    error = (await response.json()).error;
  } catch {
    // A proxy sent this response, not the gateway.
  }
  if (!error?.message) {
    return new ApiError(`The server returned status ${response.status}.`, details);
  }
  const { code = "", param = null } = error;
  return new ApiError(sentence(error.message, param), { ...details, code, param });
}

async function json(path, options) {
  const response = await send(path, options);
  try {
    return await response.json();
  } catch {
    throw new ApiError("The response was cut off.", { code: "unreachable" });
  }
}

function jobPath(id) {
  return `v1/jobs/${encodeURIComponent(id)}`;
}

/**
 * Submit a job.
 *
 * @param {Object} request A request of the contract, with its task.
 * @param {string} idempotencyKey A repeated key returns the existing job.
 */
export function submitJob(request, idempotencyKey) {
  const headers = { "Idempotency-Key": idempotencyKey };
  return json("v1/jobs", { method: "POST", body: JSON.stringify(request), headers });
}

/**
 * List jobs, newest first.
 *
 * @param {{states?: string[], task?: string, limit: number, after?: string}} query
 */
export function listJobs({ states = [], ...query }) {
  const parameters = new URLSearchParams(query);
  for (const state of states) parameters.append("state", state);
  return json(`v1/jobs?${parameters}`);
}

/** Fetch a job document. @param {string} id */
export function getJob(id) {
  return json(jobPath(id));
}

/** Cancel a job. @param {string} id */
export function cancelJob(id) {
  return json(jobPath(id), { method: "DELETE" });
}

/** Fetch the number of waiting and running jobs of each task. */
export function getQueue() {
  return json("v1/queue");
}

/** Return the path of a job's event stream. @param {string} id */
export function eventsPath(id) {
  return `${jobPath(id)}/events`;
}

/**
 * Fetch the file of a job's output.
 *
 * @param {string} id
 * @param {number} number Number of the output.
 * @returns {Promise<Blob>}
 */
export async function fetchOutput(id, number) {
  const response = await send(`${jobPath(id)}/outputs/${number}`, { timeout: 120_000 });
  return response.blob();
}
