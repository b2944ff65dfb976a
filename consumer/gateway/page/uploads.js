/** Images that the user attaches to a question, made small enough for the queue. */

// Base64 characters of all images of a request. The queue takes messages of 1 MiB, and the prompt and
// its copy in the metadata need room.
const ROOM = 940_000;
const SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp"];
const FIRST_SIDE = 2_048; // pixels; of the longer side
const SHRINK = 0.75; // of the side, for each attempt to fit
const QUALITY = 0.85;
const THUMBNAIL = 112; // pixels

/**
 * Read a file that may be an image.
 *
 * @param {File} file
 * @returns {Promise<Object>} An attachment with its size in pixels and a small data URL.
 * @throws {Error} With a sentence.
 */
export async function readImage(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "The file"} is not an image that this browser can read.`);
  }
  const { width, height } = bitmap;
  const thumbnail = drawn(bitmap, THUMBNAIL).toDataURL("image/jpeg", 0.75);
  bitmap.close();
  return { kind: "file", file, name: file.name || "Pasted image", width, height, thumbnail };
}

function drawn(bitmap, side) {
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
 * Encode files for a request; those that are too large together are made smaller.
 *
 * @param {File[]} files
 * @returns {Promise<{base64: string}[]>}
 */
export async function encodeImages(files) {
  const asTheyAre = files.filter((file) => SENT_AS_THEY_ARE.includes(file.type));
  const total = files.reduce((sum, file) => sum + base64Length(file.size), 0);
  const fits = asTheyAre.length === files.length && total <= ROOM;
  const share = Math.floor(ROOM / files.length);
  const blobs = await Promise.all(files.map((file) => (fits ? file : reduced(file, share))));
  return Promise.all(blobs.map(async (blob) => ({ base64: await base64(blob) })));
}

async function reduced(file, room) {
  if (SENT_AS_THEY_ARE.includes(file.type) && base64Length(file.size) <= room) return file;
  const bitmap = await createImageBitmap(file);
  try {
    for (let side = FIRST_SIDE; ; side = Math.floor(side * SHRINK)) {
      const canvas = drawn(bitmap, side);
      const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", QUALITY));
      if (base64Length(blob.size) <= room || side < 64) return blob;
    }
  } finally {
    bitmap.close();
  }
}

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("An image cannot be read any more. Choose it again."));
    reader.readAsDataURL(blob);
  });
}
