/** What a result says of itself: in few words for a card, in all its values for the details. */

import { announce } from "./announce.js";
import { iconButton } from "./dom.js";
import { counted, duration, size, when } from "./words.js";

const PARAMETERS = {
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  max_new_tokens: "Longest answer",
  temperature: "Temperature",
  top_p: "Top-p",
  top_k: "Top-k",
  repetition_penalty: "Repetition penalty",
};
const FORMATS = { "image/png": "PNG", "image/webp": "WebP", "image/jpeg": "JPEG" };
const FINISHED = { stop: "The model ended the text", length: "The longest length was reached" };

/**
 * The facts of a card.
 *
 * @param {import("./jobs.js").Job} job
 * @returns {string[]}
 */
export function facts(job) {
  if (job.state !== "succeeded") return [];
  const [image] = job.imageOutputs;
  const took = duration(job.result.timings.inference);
  if (!image) return [took];
  return [`${image.width} × ${image.height}`, `seed ${image.seed}`, took];
}

/**
 * All values of a job, by their names.
 *
 * @param {import("./jobs.js").Job} job
 * @param {Object|undefined} output The image that is shown.
 * @returns {[string, string][]}
 */
export function details(job, output) {
  const { result, asked } = job;
  const rows = [["Negative prompt", asked.negativePrompt]];
  if (output) {
    rows.push(
      ["Size", `${output.width} × ${output.height}`],
      ["Seed", String(output.seed)],
      ["File", `${FORMATS[output.media_type] ?? output.media_type}, ${size(output.size)}`],
    );
  }
  const text = job.outputs.find(({ kind }) => kind === "text");
  if (text) {
    rows.push(
      [
        "Length",
        `${counted(text.completion_tokens, "token")}, after ${counted(text.prompt_tokens, "token")} of input`,
      ],
      ["End", FINISHED[text.finish_reason]],
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
    ["Submitted", when(created)],
    ["Time in the queue", timings ? duration(timings.queued) : ""],
    ["Time to generate", timings ? duration(timings.inference) : ""],
    ["Time to store", timings?.upload ? duration((timings.encode ?? 0) + timings.upload) : ""],
    ["Worker", result?.worker ?? ""],
    ["Attempts", result?.attempt > 1 ? String(result.attempt) : ""],
    ["Request", id],
  ];
}

/** A button that copies a text; null where the browser does not allow it. @param {string} text */
export function copyButton(text) {
  if (!navigator.clipboard) return null; // not over plain HTTP from another machine
  return iconButton("copy", "Copy the answer", async () => {
    await navigator.clipboard.writeText(text);
    announce("Copied.");
  });
}
