/** Entry point of the live page: creates and connects the views. */

import { ActiveView } from "./active_view.js";
import { announce } from "./announce.js";
import { Composer } from "./composer.js";
import { Detail } from "./detail.js";
import { byId, setText } from "./dom.js";
import { Feed } from "./feed.js";
import { ActiveJobs } from "./jobs.js";
import { bindKeyDialog } from "./key_dialog.js";
import { hideNotice, showNotice } from "./notices.js";
import { clearOutputs } from "./outputs.js";
import { Results } from "./results.js";
import { apiKey } from "./session.js";
import { bindThemeButton } from "./theme.js";
import { truncate } from "./format.js";

const OFFLINE =
  "The gateway cannot be reached. Submitted jobs continue, and the page reconnects automatically.";
const CONNECTION = {
  connected: "Connected",
  offline: "Reconnecting",
  refused: "API key needed",
};

const active = new ActiveJobs();
const view = new ActiveView(active);
const composer = new Composer(onSubmitted);
const actions = {
  open: (job, number) => detail.open(job, number),
  ask: (job, output) => composer.askAbout(job, output),
  use: (job) => composer.use(job),
};
const results = new Results(actions);
const detail = new Detail(results, actions);
const feed = new Feed(active, {
  onConnection: showConnection,
  onEnded,
  onQueue: (queue) => {
    view.showQueue(queue);
    composer.showModels(queue);
  },
  onStarted: (event) => composer.showDefaults(event),
});
const openKeyDialog = bindKeyDialog((replaced) => {
  active.clear();
  clearOutputs();
  if (replaced) composer.clear();
  begin();
});

function begin() {
  hideNotice("key");
  feed.start();
  results.load();
}

function onSubmitted(doc) {
  const job = active.update(doc); // null if it has already ended: the list shows it
  if (job) announce(`Submitted: ${truncate(job.title, 60)}.`);
  feed.assign();
  feed.wake();
}

function onEnded(job) {
  const previewsRefused =
    job.state === "failed" && job.result?.failure?.details?.parameter === "preview";
  if (previewsRefused && job.input.request?.preview) {
    composer.disablePreviews(job).catch((error) => showNotice("previews", error.message));
  }
  results.add(job);
}

function showConnection(state, error) {
  const before = byId("connection").dataset.state;
  byId("connection").dataset.state = state;
  setText(byId("connection-text"), CONNECTION[state]);
  if (state === "connected") {
    view.setLoaded();
    hideNotice("offline");
    if (before === "offline") {
      announce("Reconnected.");
      results.loadMissing();
    }
  } else if (state === "offline") {
    showNotice("offline", error?.status ? `${OFFLINE} ${error.message}` : OFFLINE);
  } else {
    const text = apiKey()
      ? "The gateway does not accept this API key."
      : "This gateway needs an API key.";
    showNotice("key", text, { label: "Enter a key", onClick: () => openKeyDialog() });
    view.setLoaded();
  }
}

document.addEventListener("problem", ({ detail: text }) =>
  showNotice("download", `The file cannot be downloaded. ${text}`),
);
document.addEventListener("cancelled", () => feed.wake());
bindThemeButton(byId("theme-button"));
begin();
