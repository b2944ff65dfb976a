/** The form for drawings and questions. */

import { submitJob } from "./api.js";
import { Attachments, bindDropAndPaste } from "./attachments.js";
import { byId, setText } from "./dom.js";
import { FormErrors } from "./form_errors.js";
import { storeSent } from "./jobs.js";
import { writeMetadata } from "./metadata.js";
import { loadValue, storeValue } from "./session.js";
import { pluralize } from "./format.js";

const DRAFT = "draft";
const NO_PREVIEWS = "no-previews"; // set after the model has refused previews
const FIRST_QUESTION = "Describe this picture.";

const NUMBERS = {
  text_to_image: ["width", "height", "num_inference_steps", "guidance_scale", "num_images", "seed"],
  image_to_text: ["max_new_tokens", "temperature", "seed"],
};
const SEPARATE_FIELDS = ["prompt", "seed"]; // fields with a separate value for each task
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
  #unconfirmed = { body: "", key: "" }; // a request without a response; the gateway may have it
  #sending = false;
  #task = "text_to_image"; // the task that the fields show
  #queues = [];
  #others = { prompt: "", seed: "" }; // values of the task that is not shown

  /** @param {(doc: Object) => void} onSubmitted Called with the document of the new job. */
  constructor(onSubmitted) {
    this.#onSubmitted = onSubmitted;
    this.#restoreDraft();
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
      if (event.target.name === "task") return this.#selectTask(this.#fields.task.value);
      if (event.target.name) this.#errors.clear(event.target.name);
      this.#show();
      this.#saveDraft();
    });
    byId("seed-button").addEventListener("click", () => this.#set("seed", newSeed()));
    if (/Mac|iPhone|iPad/.test(navigator.platform)) setText(byId("submit-key"), "⌘");
    byId("reset-options").addEventListener("click", () => this.#reset());
    this.#attachments.addEventListener("change", () => this.#errors.clear("images"));
    this.#attachments.addEventListener("problem", ({ detail }) =>
      this.#errors.show("images", detail),
    );
    bindDropAndPaste((files) => {
      this.#selectTask("image_to_text");
      this.#attachments.addFiles(files);
    });
  }

  /** Submit the form. */
  async submit() {
    this.#errors.clearAll();
    if (this.#sending || !this.#check()) return;
    this.#setSending(true);
    try {
      const request = await this.#request();
      const doc = await submitJob(request, this.#idempotencyKey(request));
      this.#unconfirmed = { body: "", key: "" };
      storeSent(doc.id, withoutImages(request), this.#attachments.thumbnails);
      this.#onSubmitted(doc);
    } catch (error) {
      this.#showError(error);
    } finally {
      this.#setSending(false);
    }
  }

  /** Fill the form with the parameters and the seed of a job, to reproduce its image. */
  use(job) {
    this.#errors.clearAll();
    this.#selectTask(job.task);
    const { prompt = "", negativePrompt = "", request = {} } = job.input;
    const format = { "image/webp": "webp", "image/jpeg": "jpeg" }[job.imageOutputs[0]?.media_type];
    const parameters = { ...request, ...job.result?.parameters };
    this.#set("model", job.queue === job.task ? "" : job.queue);
    this.#set("prompt", prompt);
    this.#set("negative_prompt", job.task === "text_to_image" ? negativePrompt : "");
    this.#set("output_format", format ?? request.output_format ?? "png");
    for (const name of NUMBERS[job.task]) this.#set(name, parameters[name] ?? "");
    if (job.task === "text_to_image" && parameters.num_images === 1) this.#set("num_images", "");
    byId("options").open = true;
    this.#focusPrompt();
  }

  /** Prepare a question about an image of a result. */
  askAbout(job, output) {
    this.#errors.clearAll();
    this.#selectTask("image_to_text");
    this.#attachments.setOutput(job, output);
    if (!this.#fields.prompt.value.trim()) this.#set("prompt", FIRST_QUESTION);
    this.#focusPrompt();
    this.#fields.prompt.select();
  }

  /** Offer the models of all queues of the task. @param {{queues: Object[]}} answer */
  showModels({ queues }) {
    this.#queues = queues;
    this.#drawModels();
  }

  /** Show the defaults of the model as placeholders. @param {Object} event A started event. */
  showDefaults({ defaults = {} }) {
    for (const [name, value] of Object.entries(defaults)) {
      if (this.#fields[name]?.type === "number") this.#fields[name].placeholder = String(value);
    }
  }

  /** Send no preview option from now on, and resend a request that failed because of it. */
  async disablePreviews(job) {
    storeValue(NO_PREVIEWS, true);
    const { request } = job.input;
    if (!request?.preview) return;
    const { preview, ...rest } = request;
    storeSent(job.id, rest, []); // every poll reports the failed job again
    const doc = await submitJob(rest, newIdempotencyKey());
    storeSent(doc.id, rest, []);
    this.#onSubmitted(doc);
  }

  /** Clear all input: it belongs to another API key. */
  clear() {
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
    if (this.#fields.model.value) request.model = this.#fields.model.value;
    for (const name of NUMBERS[task]) {
      if (this.#fields[name].value !== "") request[name] = this.#fields[name].valueAsNumber;
    }
    if (task === "text_to_image") {
      if (negativePrompt) request.negative_prompt = negativePrompt;
      if (this.#fields.output_format.value !== "png")
        request.output_format = this.#fields.output_format.value;
      if (!loadValue(NO_PREVIEWS)) request.preview = true;
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
    if (this.#unconfirmed.body !== body) this.#unconfirmed = { body, key: newIdempotencyKey() };
    return this.#unconfirmed.key;
  }

  #showError(error) {
    if (error.status && !error.unreachable) this.#unconfirmed = { body: "", key: "" };
    const later = error.retryAfter
      ? ` You can try again in ${pluralize(error.retryAfter, "second")}.`
      : "";
    const name = error.param?.split(".")[0];
    if (name && this.#errors.has(name)) this.#errors.show(name, error.message, true);
    else this.#errors.showForForm(error.message + later);
  }

  // -- fields -----------------------------------------------------------------------------------

  #check() {
    const names = ["prompt", ...NUMBERS[this.#task]];
    const wrong = names
      .map((name) => [name, validationError(this.#fields[name])])
      .filter(([, problem]) => problem);
    if (this.#task === "image_to_text" && !this.#attachments.size) {
      wrong.unshift(["images", "Choose at least one image to ask about."]);
    }
    wrong.forEach(([name, problem], index) => this.#errors.show(name, problem, index === 0));
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

  #selectTask(task) {
    this.#fields.task.value = task;
    if (task !== this.#task) {
      this.#errors.clearAll();
      for (const name of SEPARATE_FIELDS) {
        [this.#fields[name].value, this.#others[name]] = [
          this.#others[name],
          this.#fields[name].value,
        ];
      }
    }
    this.#task = task;
    this.#drawModels();
    this.#show();
    this.#saveDraft();
  }

  /** Fill the list of models; it is hidden while the task has only its default queue. */
  #drawModels() {
    const offered = this.#queues.filter((queue) => queue.task === this.#task);
    const options = offered.map((each) => ({
      text: each.model,
      value: each.queue === each.task ? "" : each.queue,
    }));
    const select = this.#fields.model;
    const shown = [...select.options].map(({ text, value }) => ({ text, value }));
    byId("model-field").hidden = options.length < 2;
    if (JSON.stringify(shown) === JSON.stringify(options)) return; // the list may be open
    const chosen = select.value;
    select.replaceChildren(...options.map(({ text, value }) => new Option(text, value)));
    select.value = options.some(({ value }) => value === chosen) ? chosen : "";
  }

  #set(name, value) {
    this.#fields[name].value = value;
    this.#show();
    this.#saveDraft();
  }

  #reset() {
    for (const name of new Set(Object.values(NUMBERS).flat())) this.#fields[name].value = "";
    this.#fields.negative_prompt.value = "";
    this.#fields.output_format.value = "png";
    this.#errors.clearAll();
    this.#show();
    this.#saveDraft();
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

  // -- the draft, which survives a reload -------------------------------------------------------

  #saveDraft() {
    const named = [...this.#fields].filter((field) => field.name && field.type !== "radio");
    const values = Object.fromEntries(named.map((field) => [field.name, field.value]));
    values.task = this.#task; // FormData omits the disabled fields of the other task
    storeValue(DRAFT, { values, others: this.#others });
  }

  #restoreDraft() {
    const draft = loadValue(DRAFT);
    if (!draft) return;
    for (const [name, value] of Object.entries(draft.values)) {
      if (name in this.#fields) this.#fields[name].value = value;
    }
    this.#others = draft.others;
    this.#task = this.#fields.task.value;
  }
}

function validationError(field) {
  const { validity, min, max, step } = field;
  if (field.value.trim() === "" && field.required) return "This field is required.";
  if (validity.badInput) return "This must be a number.";
  if (validity.rangeUnderflow || validity.rangeOverflow)
    return `This must be between ${min} and ${max}.`;
  if (validity.stepMismatch)
    return step === "1" ? "This must be a whole number." : "This number is not valid.";
  return null;
}

function withoutImages({ images, ...request }) {
  return request;
}

function newSeed() {
  const [number] = crypto.getRandomValues(new Uint32Array(1));
  return String(number);
}

function newIdempotencyKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
