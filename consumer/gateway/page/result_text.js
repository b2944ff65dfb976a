/** Texts about a result: a summary for cards, and all values for the details. */

import { announce } from "./announce.js";
import { iconButton } from "./dom.js";
import { formatBytes, formatDuration, formatTime, pluralize } from "./format.js";

const PARAMETERS = {
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  max_new_tokens: "Maximum tokens",
  temperature: "Temperature",
  top_p: "Top-p",
  top_k: "Top-k",
  repetition_penalty: "Repetition penalty",
};
const FORMATS = { "image/png": "PNG", "image/webp": "WebP", "image/jpeg": "JPEG" };
const FINISH_REASONS = { stop: "End of the answer", length: "Token limit" };

/**
 * Return the summary of a job for its card.
 *
 * @param {import("./jobs.js").Job} job
 * @returns {string[]}
 */
export function facts(job) {
  if (job.state !== "succeeded") return [];
  const [image] = job.imageOutputs;
  const took = formatDuration(job.result.timings.inference);
  if (!image) return [took];
  return [`${image.width} × ${image.height}`, `seed ${image.seed}`, took];
}

/**
 * Return the name of the link to a file that is no image.
 *
 * @param {{media_type: string, size: number}} output
 * @returns {string}
 */
export function fileFacts(output) {
  return `Download ${output.media_type}, ${formatBytes(output.size)}`;
}

/**
 * Return all values of a job with their labels.
 *
 * @param {import("./jobs.js").Job} job
 * @param {Object|undefined} output The image in the dialog.
 * @returns {[string, string][]}
 */
export function details(job, output) {
  const { result, input } = job;
  const rows = [["Negative prompt", input.negativePrompt]];
  if (output) {
    rows.push(
      ["Size", `${output.width} × ${output.height}`],
      ["Seed", String(output.seed)],
      ["File", `${FORMATS[output.media_type] ?? output.media_type}, ${formatBytes(output.size)}`],
    );
  }
  const text = job.outputs.find(({ kind }) => kind === "text");
  if (text) {
    rows.push(
      [
        "Length",
        `${pluralize(text.completion_tokens, "token")}, ${pluralize(text.prompt_tokens, "token")} of input`,
      ],
      ["Finish reason", FINISH_REASONS[text.finish_reason]],
      ["Seed", text.seed === undefined || text.seed === null ? undefined : String(text.seed)],
    );
  }
  rows.push(...parameterRows(result?.parameters ?? {}), ...runRows(job));
  return rows.filter(([, value]) => value);
}

function parameterRows(parameters) {
  const rows = Object.entries(PARAMETERS).map(([name, label]) => [label, parameters[name]]);
  const adapters = Object.entries(parameters.adapters ?? {}).map(
    ([name, weight]) => `${name} (${weight})`,
  );
  return [...rows, ["Adapters", adapters.join(", ")]].map(([label, value]) => [
    label,
    value === undefined ? "" : String(value),
  ]);
}

function runRows({ id, created, result }) {
  const { model, timings } = result ?? {};
  const parts = model
    ? [model.family, model.dtype, model.device, model.revision].filter(Boolean)
    : [];
  return [
    ["Model", model ? `${model.id} (${parts.join(", ")})` : ""],
    ["Submitted", formatTime(created)],
    ["Time in the queue", timings ? formatDuration(timings.queued) : ""],
    ["Time to generate", timings ? formatDuration(timings.inference) : ""],
    ["Time to store", timings?.upload ? formatDuration((timings.encode ?? 0) + timings.upload) : ""],
    ["Worker", result?.worker ?? ""],
    ["Attempts", result?.attempt > 1 ? String(result.attempt) : ""],
    ["Request", id],
  ];
}

/** Create a button that copies a text; null without a clipboard. @param {string} text */
export function copyButton(text) {
  if (!navigator.clipboard) return null; // browsers have none for remote pages over plain HTTP
  return iconButton("copy", "Copy the answer", async () => {
    await navigator.clipboard.writeText(text);
    announce("Copied.");
  });
}
