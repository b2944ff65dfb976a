/** The live page: puts its parts together. */

import { ActiveView } from "./active_view.js";
import { announce } from "./announce.js";
import { Composer } from "./composer.js";
import { Detail } from "./detail.js";
import { byId, setText } from "./dom.js";
import { Feed } from "./feed.js";
import { ActiveJobs } from "./jobs.js";
import { bindKeyDialog } from "./key_dialog.js";
import { hideNotice, showNotice } from "./notices.js";
import { forgetOutputs } from "./outputs.js";
import { Results } from "./results.js";
import { apiKey } from "./session.js";
import { bindThemeButton } from "./theme.js";
import { shortened } from "./words.js";

const OFFLINE =
  "The gateway cannot be reached. Jobs that were submitted go on; the page connects again by itself.";
const CONNECTION = {
  connected: "Connected",
  offline: "Connecting again",
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
  onQueue: (queue) => view.showQueue(queue),
  onStarted: (event) => composer.learnDefaults(event),
});
const openKeyDialog = bindKeyDialog((replaced) => {
  active.clear();
  forgetOutputs();
  if (replaced) composer.forget();
  begin();
});

function begin() {
  hideNotice("key");
  feed.start();
  results.load();
}

function onSubmitted(doc) {
  const job = active.update(doc); // null where it has ended already: the list has it
  if (job) announce(`Submitted: ${shortened(job.title, 60)}.`);
  feed.assign();
  feed.wake();
}

function onEnded(job) {
  const previewsRefused =
    job.state === "failed" && job.result?.failure?.details?.parameter === "preview";
  if (previewsRefused && job.asked.request?.preview) {
    composer.withoutPreviews(job).catch((error) => showNotice("previews", error.message));
  }
  results.add(job);
}

function showConnection(state, error) {
  const before = byId("connection").dataset.state;
  byId("connection").dataset.state = state;
  setText(byId("connection-text"), CONNECTION[state]);
  if (state === "connected") {
    view.loaded();
    hideNotice("offline");
    if (before === "offline") {
      announce("Connected again.");
      results.loadMissing();
    }
  } else if (state === "offline") {
    showNotice("offline", error?.status ? `${OFFLINE} ${error.message}` : OFFLINE);
  } else {
    const text = apiKey()
      ? "The gateway does not accept this API key."
      : "This gateway needs an API key.";
    showNotice("key", text, { label: "Enter a key", onClick: () => openKeyDialog() });
    view.loaded();
  }
}

document.addEventListener("problem", ({ detail: text }) =>
  showNotice("download", `The file cannot be fetched. ${text}`),
);
document.addEventListener("cancelled", () => feed.wake());
bindThemeButton(byId("theme-button"));
begin();
