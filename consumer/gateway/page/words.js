/** Numbers, times and messages as people read them. */

const MINUTE = 60;
const HOUR = 60 * MINUTE;

const LABELS = {
  prompt: "The prompt",
  negative_prompt: "The negative prompt",
  width: "Width",
  height: "Height",
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  num_images: "Number of images",
  seed: "The seed",
  output_format: "The format",
  images: "Images",
  max_new_tokens: "Longest answer",
  temperature: "Temperature",
  top_p: "Top-p",
};

/** @param {number} seconds */
export function duration(seconds) {
  if (seconds < 0.0995) return `${Math.round(seconds * 1_000)} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < MINUTE) return `${Math.round(seconds)} s`;
  if (seconds < HOUR) {
    const rest = Math.round(seconds % MINUTE);
    return `${Math.floor(seconds / MINUTE)} min${rest && rest < MINUTE ? ` ${rest} s` : ""}`;
  }
  const minutes = Math.round((seconds % HOUR) / MINUTE);
  return `${Math.floor(seconds / HOUR)} h${minutes ? ` ${minutes} min` : ""}`;
}

/**
 * Round a duration that is only an estimate: tenths of a second would promise too much.
 *
 * @param {number} seconds
 */
export function roughly(seconds) {
  if (seconds < 1.5) return "about 1 s";
  if (seconds < MINUTE) return `about ${Math.round(seconds)} s`;
  if (seconds < HOUR) return `about ${Math.round(seconds / MINUTE)} min`;
  return `about ${Math.round(seconds / HOUR)} h`;
}

/**
 * Say when something was: the time alone for today, else with its date.
 *
 * @param {string|null} time RFC 3339.
 */
export function when(time) {
  if (!time) return "";
  const date = new Date(time);
  const clock = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  if (date.toDateString() === new Date().toDateString()) return clock;
  return `${date.toLocaleDateString([], { day: "numeric", month: "short", year: "numeric" })}, ${clock}`;
}

/** @param {number} bytes */
export function size(bytes) {
  if (bytes < 1_000) return `${bytes} bytes`;
  if (bytes < 1_000_000) return `${Math.round(bytes / 1_000)} kB`;
  return `${(bytes / 1_000_000).toFixed(1)} MB`;
}

/** @param {number} count @param {string} noun */
export function counted(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/**
 * Make a message of the API a sentence: with the field's label, a capital and a full stop.
 *
 * @param {string} message
 * @param {string|null} param The field that the message is about.
 */
export function sentence(message, param = null) {
  let text = message.trim();
  const prefix = `${param}: `;
  if (param && text.startsWith(prefix)) {
    const label = LABELS[param] ?? param;
    const rest = text.slice(prefix.length);
    text =
      rest.startsWith("must ") || rest.startsWith("has ")
        ? `${label} ${rest}`
        : `${label}: ${rest}`;
  }
  text = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?…]$/.test(text) ? text : `${text}.`;
}

/** @param {string} text @param {number} most Characters. */
export function shortened(text, most) {
  const characters = Array.from(text.replace(/\s+/g, " ").trim());
  return characters.length <= most
    ? characters.join("")
    : `${characters.slice(0, most - 1).join("")}…`;
}
