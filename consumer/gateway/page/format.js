/** Formats numbers, times and messages for people. */

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
  max_new_tokens: "Maximum tokens",
  temperature: "Temperature",
  top_p: "Top-p",
};

/** Format a measured duration. @param {number} seconds */
export function formatDuration(seconds) {
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
 * Format an estimated duration, rounded to whole seconds, minutes or hours.
 *
 * @param {number} seconds
 */
export function approximateDuration(seconds) {
  if (seconds < 1.5) return "about 1 s";
  if (seconds < MINUTE) return `about ${Math.round(seconds)} s`;
  if (seconds < HOUR) return `about ${Math.round(seconds / MINUTE)} min`;
  return `about ${Math.round(seconds / HOUR)} h`;
}

/**
 * Format a point in time: the time of day for today, otherwise with the date.
 *
 * @param {string|null} time RFC 3339.
 */
export function formatTime(time) {
  if (!time) return "";
  const date = new Date(time);
  const clock = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  if (date.toDateString() === new Date().toDateString()) return clock;
  return `${date.toLocaleDateString([], { day: "numeric", month: "short", year: "numeric" })}, ${clock}`;
}

/** Format a size. @param {number} bytes */
export function formatBytes(bytes) {
  if (bytes < 1_000) return `${bytes} bytes`;
  if (bytes < 1_000_000) return `${Math.round(bytes / 1_000)} kB`;
  return `${(bytes / 1_000_000).toFixed(1)} MB`;
}

/** Format a count with its noun in singular or plural. @param {number} count @param {string} noun */
export function pluralize(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/**
 * Turn a message of the API into a sentence with the field's label, a capital and a full stop.
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

/** Truncate a text and collapse its white space. @param {string} text @param {number} limit Characters. */
export function truncate(text, limit) {
  const characters = Array.from(text.replace(/\s+/g, " ").trim());
  return characters.length <= limit
    ? characters.join("")
    : `${characters.slice(0, limit - 1).join("")}…`;
}
