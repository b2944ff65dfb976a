/**
 * Stores the prompt in the metadata of a request, which every event repeats.
 *
 * A result has the numeric parameters but no prompt. The history shows the prompt from the metadata.
 * A value holds 512 characters and a request holds 16 values, so a long prompt takes several values.
 */

const VALUE_LENGTH = 512; // characters
const PROMPT_VALUES = 12;
const NEGATIVE_VALUES = 3;

function split(name, text, limit) {
  const characters = Array.from(text); // code points, so that no surrogate pair is split
  const entries = [];
  for (let i = 0; i * VALUE_LENGTH < characters.length && i < limit; i += 1) {
    const value = characters.slice(i * VALUE_LENGTH, (i + 1) * VALUE_LENGTH).join("");
    entries.push([i === 0 ? name : `${name}.${i}`, value]);
  }
  return entries;
}

function join(metadata, name) {
  let text = metadata[name];
  for (let i = 1; text !== undefined && metadata[`${name}.${i}`] !== undefined; i += 1) {
    text += metadata[`${name}.${i}`];
  }
  return text;
}

/**
 * Write the metadata of a request.
 *
 * @param {{prompt: string, negativePrompt?: string, images?: {id: string, number: number}[]}} content
 *   The images refer to outputs of earlier jobs.
 */
export function writeMetadata({ prompt, negativePrompt = "", images = [] }) {
  const entries = [
    ...split("prompt", prompt, PROMPT_VALUES),
    ...split("negative_prompt", negativePrompt, NEGATIVE_VALUES),
  ];
  // An id has at most 64 characters, so six references fit one value.
  const references = images.slice(0, 6).map(({ id, number }) => `${id}/${number}`);
  if (references.length) entries.push(["images", references.join(" ")]);
  return Object.fromEntries(entries);
}

/**
 * Read the metadata that this page or another client wrote.
 *
 * @param {Object|undefined} metadata
 * @returns {{prompt?: string, negativePrompt?: string, images: {id: string, number: number}[]}}
 */
export function readMetadata(metadata = {}) {
  const images = [];
  for (const name of (metadata.images ?? "").split(" ")) {
    const match = /^([A-Za-z0-9_-]+)\/(\d+)$/.exec(name);
    if (match) images.push({ id: match[1], number: Number(match[2]) });
  }
  return {
    prompt: join(metadata, "prompt"),
    negativePrompt: join(metadata, "negative_prompt"),
    images,
  };
}
