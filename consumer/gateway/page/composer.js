/** The form: what to draw, or what to ask. */

import { submitJob } from "./api.js";
import { Attachments, bindDropAndPaste } from "./attachments.js";
import { byId, setText } from "./dom.js";
import { FormErrors } from "./form_errors.js";
import { keepSent } from "./jobs.js";
import { writeMetadata } from "./metadata.js";
import { recall, remember } from "./session.js";
import { counted } from "./words.js";

const DRAFT = "draft";
const NO_PREVIEWS = "no-previews"; // the model has refused them
const FIRST_QUESTION = "Describe this picture.";

const NUMBERS = {
  text_to_image: ["width", "height", "num_inference_steps", "guidance_scale", "num_images", "seed"],
  image_to_text: ["max_new_tokens", "temperature", "seed"],
};
const OF_EACH_TASK = ["prompt", "seed"]; // one field that has a value for each task
const TASKS = {
  text_to_image: {
    verb: "Draw",
    label: "Prompt",
    placeholder: "A red circle left of a blue square",
  },
  image_to_text: { verb: "Ask", label: "Question", placeholder: "What is in this image?" },
};

export class Composer {
  #form = byId("composer");
  #fields = this.#form.elements;
  #errors = new FormErrors(this.#form);
  #attachments = new Attachments();
  #onSubmitted;
  #unanswered = { body: "", key: "" }; // a request whose answer was lost; it may have arrived
  #sending = false;
  #task = "text_to_image"; // the one that the fields show
  #others = { prompt: "", seed: "" }; // of the task that is not shown

  /** @param {(doc: Object) => void} onSubmitted Called with the document of the new job. */
  constructor(onSubmitted) {
    this.#onSubmitted = onSubmitted;
    this.#restore();
    this.#bind();
    this.#show();
  }

  #bind() {
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.#form.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.submit();
    });
    this.#form.addEventListener("input", (event) => {
      if (event.target.name === "task") return this.#choose(this.#fields.task.value);
      if (event.target.name) this.#errors.clear(event.target.name);
      this.#show();
      this.#keep();
    });
    byId("seed-button").addEventListener("click", () => this.#set("seed", newSeed()));
    if (/Mac|iPhone|iPad/.test(navigator.platform)) setText(byId("submit-key"), "⌘");
    byId("reset-options").addEventListener("click", () => this.#reset());
    this.#attachments.addEventListener("change", () => this.#errors.clear("images"));
    this.#attachments.addEventListener("problem", ({ detail }) =>
      this.#errors.show("images", detail),
    );
    bindDropAndPaste((files) => {
      this.#choose("image_to_text");
      this.#attachments.addFiles(files);
    });
  }

  /** Send what the form says. */
  async submit() {
    this.#errors.clearAll();
    if (this.#sending || !this.#check()) return;
    this.#setSending(true);
    try {
      const request = await this.#request();
      const doc = await submitJob(request, this.#idempotencyKey(request));
      this.#unanswered = { body: "", key: "" };
      keepSent(doc.id, withoutImages(request), this.#attachments.thumbnails);
      this.#onSubmitted(doc);
    } catch (error) {
      this.#refused(error);
    } finally {
      this.#setSending(false);
    }
  }

  /** Use the parameters of a job again; the seed too, so that the same image comes out. */
  use(job) {
    this.#errors.clearAll();
    this.#choose(job.task);
    const { prompt = "", negativePrompt = "", request = {} } = job.asked;
    const format = { "image/webp": "webp", "image/jpeg": "jpeg" }[job.imageOutputs[0]?.media_type];
    const parameters = { ...request, ...job.result?.parameters };
    this.#set("prompt", prompt);
    this.#set("negative_prompt", job.task === "text_to_image" ? negativePrompt : "");
    this.#set("output_format", format ?? request.output_format ?? "png");
    for (const name of NUMBERS[job.task]) this.#set(name, parameters[name] ?? "");
    if (job.task === "text_to_image" && parameters.num_images === 1) this.#set("num_images", "");
    byId("options").open = true;
    this.#focusPrompt();
  }

  /** Ask about an image of a result. */
  askAbout(job, output) {
    this.#errors.clearAll();
    this.#choose("image_to_text");
    this.#attachments.setOutput(job, output);
    if (!this.#fields.prompt.value.trim()) this.#set("prompt", FIRST_QUESTION);
    this.#focusPrompt();
    this.#fields.prompt.select();
  }

  /** Show what the model uses where a request says nothing. @param {Object} event Of its start. */
  learnDefaults({ defaults = {} }) {
    for (const [name, value] of Object.entries(defaults)) {
      if (this.#fields[name]?.type === "number") this.#fields[name].placeholder = String(value);
    }
  }

  /** Draw without previews from now on; send a request again that failed for them. */
  async withoutPreviews(job) {
    remember(NO_PREVIEWS, true);
    const { request } = job.asked;
    if (!request?.preview) return;
    const { preview, ...rest } = request;
    keepSent(job.id, rest, []); // the list names the failed job again and again
    const doc = await submitJob(rest, newKey());
    keepSent(doc.id, rest, []);
    this.#onSubmitted(doc);
  }

  /** Forget everything that was entered: it was entered by the holder of another key. */
  forget() {
    this.#attachments.clear();
    this.#others = { prompt: "", seed: "" };
    this.#reset();
    this.#set("prompt", "");
  }

  // -- the request ------------------------------------------------------------------------------

  async #request() {
    const task = this.#task;
    const prompt = this.#fields.prompt.value;
    const negativePrompt =
      task === "text_to_image" ? this.#fields.negative_prompt.value.trim() : "";
    const request = { task, prompt };
    for (const name of NUMBERS[task]) {
      if (this.#fields[name].value !== "") request[name] = this.#fields[name].valueAsNumber;
    }
    if (task === "text_to_image") {
      if (negativePrompt) request.negative_prompt = negativePrompt;
      if (this.#fields.output_format.value !== "png")
        request.output_format = this.#fields.output_format.value;
      if (!recall(NO_PREVIEWS)) request.preview = true;
    } else {
      request.images = await this.#attachments.encoded();
      request.stream = true;
    }
    const images = task === "image_to_text" ? this.#attachments.outputs : [];
    request.metadata = writeMetadata({ prompt, negativePrompt, images });
    return request;
  }

  #idempotencyKey(request) {
    const body = JSON.stringify(request);
    if (this.#unanswered.body !== body) this.#unanswered = { body, key: newKey() };
    return this.#unanswered.key;
  }

  #refused(error) {
    if (error.status && !error.unreachable) this.#unanswered = { body: "", key: "" };
    const later = error.retryAfter
      ? ` You can try again in ${counted(error.retryAfter, "second")}.`
      : "";
    const name = error.param?.split(".")[0];
    if (name && this.#errors.has(name)) this.#errors.show(name, error.message, true);
    else this.#errors.showForForm(error.message + later);
  }

  // -- fields -----------------------------------------------------------------------------------

  #check() {
    const names = ["prompt", ...NUMBERS[this.#task]];
    const wrong = names
      .map((name) => [name, problemOf(this.#fields[name])])
      .filter(([, problem]) => problem);
    if (this.#task === "image_to_text" && !this.#attachments.size) {
      wrong.unshift(["images", "Choose at least one image to ask about."]);
    }
    wrong.forEach(([name, problem], place) => this.#errors.show(name, problem, place === 0));
    return wrong.length === 0;
  }

  #show() {
    const { verb, label, placeholder } = TASKS[this.#task];
    const drawing = this.#task === "text_to_image";
    byId("images-field").hidden = drawing;
    for (const [id, on] of [
      ["draw-options", drawing],
      ["ask-options", !drawing],
    ]) {
      byId(id).hidden = !on;
      byId(id).disabled = !on;
    }
    setText(byId("prompt-label"), label);
    this.#fields.prompt.placeholder = placeholder;
    if (!this.#sending) setText(byId("submit"), verb);
    const set = NUMBERS[this.#task].filter((name) => this.#fields[name].value !== "").length;
    setText(byId("options-summary"), set ? `${set} set` : "");
  }

  #choose(task) {
    this.#fields.task.value = task;
    if (task !== this.#task) {
      this.#errors.clearAll();
      for (const name of OF_EACH_TASK) {
        [this.#fields[name].value, this.#others[name]] = [
          this.#others[name],
          this.#fields[name].value,
        ];
      }
    }
    this.#task = task;
    this.#show();
    this.#keep();
  }

  #set(name, value) {
    this.#fields[name].value = value;
    this.#show();
    this.#keep();
  }

  #reset() {
    for (const name of new Set(Object.values(NUMBERS).flat())) this.#fields[name].value = "";
    this.#fields.negative_prompt.value = "";
    this.#fields.output_format.value = "png";
    this.#errors.clearAll();
    this.#show();
    this.#keep();
  }

  #focusPrompt() {
    this.#form.scrollIntoView({ block: "nearest" });
    this.#fields.prompt.focus();
  }

  #setSending(sending) {
    this.#sending = sending;
    byId("submit").setAttribute("aria-disabled", String(sending));
    setText(byId("submit"), sending ? "Sending…" : TASKS[this.#task].verb);
  }

  // -- a draft that survives a reload -----------------------------------------------------------

  #keep() {
    const named = [...this.#fields].filter((field) => field.name && field.type !== "radio");
    const values = Object.fromEntries(named.map((field) => [field.name, field.value]));
    values.task = this.#task; // FormData would leave out the disabled fields of the other task
    remember(DRAFT, { values, others: this.#others });
  }

  #restore() {
    const draft = recall(DRAFT);
    if (!draft) return;
    for (const [name, value] of Object.entries(draft.values)) {
      if (name in this.#fields) this.#fields[name].value = value;
    }
    this.#others = draft.others;
    this.#task = this.#fields.task.value;
  }
}

function problemOf(field) {
  const { validity, min, max, step } = field;
  if (field.value.trim() === "" && field.required) return "Write something first.";
  if (validity.badInput) return "This must be a number.";
  if (validity.rangeUnderflow || validity.rangeOverflow)
    return `This must be between ${min} and ${max}.`;
  if (validity.stepMismatch)
    return step === "1" ? "This must be a whole number." : "This number does not fit.";
  return null;
}

function withoutImages({ images, ...request }) {
  return request;
}

function newSeed() {
  const [number] = crypto.getRandomValues(new Uint32Array(1));
  return String(number);
}

function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
