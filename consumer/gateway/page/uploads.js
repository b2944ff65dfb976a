/** Reads and encodes the images of a question, small enough for a message of the queue. */

// Base64 characters of all images of a request. A message of the queue has at most 1 MiB, including
// the prompt and its copy in the metadata.
const MAX_BASE64 = 940_000;
const UNCHANGED_TYPES = ["image/png", "image/jpeg", "image/webp"];
const MAX_SIDE = 2_048; // pixels of the longer side
const SHRINK = 0.75; // factor of the side for each further attempt
const QUALITY = 0.85;
const THUMBNAIL = 112; // pixels of the longer side

/**
 * Read an image file.
 *
 * @param {File} file
 * @returns {Promise<Object>} An attachment with its size in pixels and its thumbnail as a data URL.
 * @throws {Error} The file is no image. The message is a sentence for the user.
 */
export async function readImage(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "The file"} is not an image that this browser can read.`);
  }
  const { width, height } = bitmap;
  const thumbnail = drawScaled(bitmap, THUMBNAIL).toDataURL("image/jpeg", 0.75);
  bitmap.close();
  return { kind: "file", file, name: file.name || "Pasted image", width, height, thumbnail };
}

function drawScaled(bitmap, side) {
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // a JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}

const base64Length = (bytes) => Math.ceil(bytes / 3) * 4;

/**
 * Encode files for a request, and reduce them if they are too large together.
 *
 * @param {File[]} files
 * @returns {Promise<{base64: string}[]>}
 */
export async function encodeImages(files) {
  const unchanged = files.filter((file) => UNCHANGED_TYPES.includes(file.type));
  const total = files.reduce((sum, file) => sum + base64Length(file.size), 0);
  const fits = unchanged.length === files.length && total <= MAX_BASE64;
  const share = Math.floor(MAX_BASE64 / files.length);
  const blobs = await Promise.all(files.map((file) => (fits ? file : reduce(file, share))));
  return Promise.all(blobs.map(async (blob) => ({ base64: await base64(blob) })));
}

async function reduce(file, limit) {
  if (UNCHANGED_TYPES.includes(file.type) && base64Length(file.size) <= limit) return file;
  const bitmap = await createImageBitmap(file);
  try {
    for (let side = MAX_SIDE; ; side = Math.floor(side * SHRINK)) {
      const canvas = drawScaled(bitmap, side);
      const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", QUALITY));
      if (base64Length(blob.size) <= limit || side < 64) return blob;
    }
  } finally {
    bitmap.close();
  }
}

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("An image is no longer readable. Choose it again."));
    reader.readAsDataURL(blob);
  });
}
