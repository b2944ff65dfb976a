/**
 * What a request says of itself in its metadata, which every event repeats.
 *
 * A result holds numbers only: its parameters, no text. So the page puts the prompt into the metadata,
 * and the history can show it. A value holds 512 characters and a request 16 values, so a long prompt
 * takes several.
 */

const PIECE = 512; // characters of a value
const PROMPT_PIECES = 12;
const NEGATIVE_PIECES = 3;

function pieces(name, text, most) {
  const characters = Array.from(text); // code points: a pair of surrogates is never split
  const entries = [];
  for (let i = 0; i * PIECE < characters.length && i < most; i += 1) {
    const piece = characters.slice(i * PIECE, (i + 1) * PIECE).join("");
    entries.push([i === 0 ? name : `${name}.${i}`, piece]);
  }
  return entries;
}

function joined(metadata, name) {
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
 *   The images are outputs of earlier jobs.
 */
export function writeMetadata({ prompt, negativePrompt = "", images = [] }) {
  const entries = [
    ...pieces("prompt", prompt, PROMPT_PIECES),
    ...pieces("negative_prompt", negativePrompt, NEGATIVE_PIECES),
  ];
  // Ids have at most 64 characters: six of them fit one value.
  const named = images.slice(0, 6).map(({ id, number }) => `${id}/${number}`);
  if (named.length) entries.push(["images", named.join(" ")]);
  return Object.fromEntries(entries);
}

/**
 * Read the metadata of a job that this page or another client has written.
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
    prompt: joined(metadata, "prompt"),
    negativePrompt: joined(metadata, "negative_prompt"),
    images,
  };
}
