/** The API reference: renders /openapi.json. */

import { byId, element } from "./dom.js";
import { bindThemeButton } from "./theme.js";

const METHODS = ["get", "post", "put", "patch", "delete"];
// Base URL of the gateway. A proxy may serve the gateway under a prefix.
const origin = new URL(".", document.baseURI).href.replace(/\/$/, "");
const MAX_DEPTH = 4; // nested object levels that are shown

bindThemeButton(byId("theme-button"));
show().catch(() => {
  byId("state").textContent = "The reference cannot be loaded. Reload the page to retry.";
});

async function show() {
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error(String(response.status));
  const api = await response.json();
  const operations = Object.entries(api.paths).flatMap(([path, item]) =>
    METHODS.filter((method) => item[method]).map((method) => ({ path, method, ...item[method] })),
  );
  byId("contents").replaceChildren(...operations.map(link));
  byId("operations").replaceChildren(
    introduction(api),
    ...operations.map((each) => section(api, each)),
  );
  byId("operations").removeAttribute("aria-busy");
  if (location.hash)
    document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
}

function introduction({ info }) {
  return element(
    "section",
    { class: "operation" },
    element("h2", {}, `${info.title} ${info.version}`),
    prose(info.description),
  );
}

const anchor = ({ method, path }) => `${method}${path.replaceAll(/[^A-Za-z0-9]+/g, "-")}`;

function link(operation) {
  const { method, path } = operation;
  const label = element("span", { class: "method" }, method.toUpperCase());
  return element("li", {}, element("a", { href: `#${anchor(operation)}` }, label, path));
}

function section(api, operation) {
  const { method, path, summary, description, parameters = [], requestBody, responses } = operation;
  const id = anchor(operation);
  return element(
    "section",
    { class: "operation", id, "aria-labelledby": `${id}-title` },
    element(
      "h2",
      { id: `${id}-title` },
      element("span", { class: "method" }, method.toUpperCase()),
      element("code", {}, path),
    ),
    summary && description !== summary ? element("p", {}, element("strong", {}, summary)) : null,
    prose(description),
    ...parameterTable(api, parameters),
    ...bodyTables(api, requestBody),
    ...responseTable(api, responses),
    element("h3", {}, "Example"),
    element("pre", { tabindex: "0" }, example(api, operation)),
  );
}

/** Render a description, with `code` between back quotes. */
function prose(text) {
  if (!text) return null;
  const parts = text.trim().split("`");
  return element(
    "p",
    { class: "text" },
    ...parts.map((part, i) => (i % 2 ? element("code", {}, part) : part)),
  );
}

function parameterTable(api, parameters) {
  if (!parameters.length) return [];
  const rows = parameters.map((each) => {
    const parameter = resolved(api, each);
    const location = parameter.in === "query" ? "" : ` in the ${parameter.in}`;
    return row(
      api,
      parameter.name,
      parameter.schema ?? {},
      parameter.required,
      parameter.description,
      location,
    );
  });
  return [element("h3", {}, "Parameters"), table(rows)];
}

function bodyTables(api, requestBody) {
  return Object.entries(resolved(api, requestBody ?? {}).content ?? {}).flatMap(
    ([type, { schema }]) => [
      element("h3", {}, "Body, ", element("code", {}, type)),
      ...fieldTables(api, schema, 0),
    ],
  );
}

function responseTable(api, responses = {}) {
  const rows = Object.entries(responses).map(([status, each]) => {
    const { description, content = {} } = resolved(api, each);
    const types = Object.entries(content).map(([type, { schema }]) => {
      const inner = schema ? fieldTables(api, schema, 1) : [];
      if (!inner.length) return element("code", {}, type);
      return element("details", {}, element("summary", {}, element("code", {}, type)), ...inner);
    });
    return element(
      "tr",
      {},
      element("th", { scope: "row", class: "name" }, status),
      element("td", {}, prose(description), ...types),
    );
  });
  return rows.length ? [element("h3", {}, "Responses"), table(rows)] : [];
}

function table(rows) {
  return element("table", { class: "fields" }, element("tbody", {}, ...rows));
}

function resolved(api, value) {
  if (!value?.$ref) return value ?? {};
  return (
    value.$ref
      .replace(/^#\//, "")
      .split("/")
      .reduce((found, part) => found?.[part.replaceAll("~1", "/").replaceAll("~0", "~")], api) ?? {}
  );
}

/** Return the alternatives of a schema without `null`. */
function alternatives(api, schema) {
  const options = schema.anyOf ?? schema.oneOf;
  return options
    ? options.map((each) => resolved(api, each)).filter(({ type }) => type !== "null")
    : [schema];
}

/** Render the fields of an object schema, or of each of its alternatives. */
function fieldTables(api, schema, depth) {
  if (depth > MAX_DEPTH) return [];
  const options = alternatives(api, resolved(api, schema)).map((each) =>
    each.type === "array" ? resolved(api, each.items) : each,
  );
  const flat = options
    .flatMap((each) => alternatives(api, each))
    .filter(({ properties }) => properties);
  return flat.map((object) => {
    const isRequired = ([name]) => object.required?.includes(name) ?? false;
    const fields = Object.entries(object.properties);
    const ordered = fields.sort((a, b) => isRequired(b) - isRequired(a));
    const rows = ordered.map(([name, each]) => {
      const target = resolved(api, each);
      return row(
        api,
        name,
        target,
        object.required?.includes(name),
        each.description ?? target.description,
        "",
        depth,
      );
    });
    const caption =
      flat.length > 1 && object.title ? element("p", { class: "hint" }, object.title) : null;
    return element("div", {}, caption, table(rows));
  });
}

function row(api, name, schema, required, description, location, depth = 0) {
  const inner = fieldTables(api, schema, depth + 1);
  return element(
    "tr",
    {},
    element(
      "th",
      { scope: "row", class: "name" },
      element("code", {}, name),
      required ? element("span", { class: "required" }, " required") : null,
    ),
    element("td", { class: "type" }, typeText(api, schema) + location),
    element(
      "td",
      {},
      prose(description),
      inner.length ? element("details", {}, element("summary", {}, "Fields"), ...inner) : null,
    ),
  );
}

function typeText(api, schema) {
  const texts = alternatives(api, resolved(api, schema)).map((each) => {
    if (each.const !== undefined) return JSON.stringify(each.const);
    if (each.enum) return each.enum.map((value) => JSON.stringify(value)).join(", ");
    if (each.type === "array") return `list of ${typeText(api, each.items ?? {})}`;
    if (each.anyOf ?? each.oneOf) return typeText(api, each);
    return (each.type ?? "any") + bounds(each);
  });
  const fallback = schema.default;
  const known =
    fallback === undefined || fallback === null || typeof fallback === "object"
      ? ""
      : `; ${JSON.stringify(fallback)} by default`;
  return [...new Set(texts)].join(" or ") + known;
}

function bounds(schema) {
  const lower =
    schema.minimum ??
    (schema.exclusiveMinimum === undefined ? undefined : `more than ${schema.exclusiveMinimum}`);
  const upper = schema.maximum ?? schema.exclusiveMaximum;
  if (lower !== undefined && upper !== undefined) return `, ${lower} to ${upper}`;
  if (lower !== undefined) return `, from ${lower}`;
  return schema.maxLength ? `, at upper ${schema.maxLength} characters` : "";
}

function example(api, { method, path, requestBody, parameters = [] }) {
  const lines = [`curl${method === "get" ? "" : ` -X ${method.toUpperCase()}`} ${origin}${path}`];
  if (
    parameters.some((each) => resolved(api, each).in === "header") ||
    path.startsWith("/v1") ||
    path === "/infer"
  ) {
    lines.push(`-H "Authorization: Bearer $API_KEY"`);
  }
  const schema = requestBody && resolved(api, requestBody).content?.["application/json"]?.schema;
  if (schema)
    lines.push(
      `-H "Content-Type: application/json"`,
      `-d '${JSON.stringify(sample(api, schema, 0))}'`,
    );
  return lines.join(" \\\n  ");
}

/** Return an example value of a schema, with the required fields only. */
function sample(api, schema, depth) {
  const target = alternatives(api, resolved(api, schema))[0] ?? {};
  const { examples, example, const: constant, enum: values } = target;
  const value = examples?.[0] ?? example ?? constant ?? values?.[0] ?? target.default;
  if (value !== undefined && value !== null) return value;
  if (target.anyOf ?? target.oneOf)
    return depth < MAX_DEPTH ? sample(api, target, depth + 1) : null;
  if (target.properties && depth < MAX_DEPTH) {
    const names = (target.required ?? []).filter((name) => target.properties[name]);
    return Object.fromEntries(
      names.map((name) => [name, sample(api, target.properties[name], depth + 1)]),
    );
  }
  if (target.type === "array")
    return depth < MAX_DEPTH ? [sample(api, target.items ?? {}, depth + 1)] : [];
  return { string: "…", integer: 1, number: 1, boolean: true }[target.type] ?? {};
}
