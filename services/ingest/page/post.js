/** Posts an event from a form, or a file of NDJSON in batches, and shows every answer. */

import { BASE, Problem, call, pause } from "./api.js";
import { address } from "./app.js";
import { asPython, button, bytes, commands, count, curlToken, field, fill, foreign, h, problemBox, quoted } from "./dom.js";
import { t } from "./texts.js";

/** of a request with a part of a file: well below what the service takes */
const BATCH_EVENTS = 500;
const BATCH_BYTES = 2 << 20;
/** refused lines that are listed */
const LISTED = 100;
const LONGEST_WAIT = 30;

class Post extends HTMLElement {
	connectedCallback() {
		this.gone = new AbortController();
		fill(this, h("div.page", {}, h("h1", { tabindex: "-1" }, t("view-post")), h("div.columns", {}, this.formCard(), this.fileCard())));
	}

	disconnectedCallback() {
		this.gone.abort();
	}

	// -- one event ------------------------------------------------------------------------------------------------------

	formCard() {
		const id = h("input", { type: "text", required: true, pattern: "[A-Za-z0-9_\\-]{1,128}", maxlength: 128, autocomplete: "off", spellcheck: "false", value: this.query.get("consultation") ?? "" });
		const key = h("input", { type: "text", autocomplete: "off", spellcheck: "false", maxlength: 255 });
		const body = h("textarea", { rows: 9, spellcheck: "false", class: "code" });
		body.value = '{\n  "event_type": "MESSAGE_RECEIVED",\n  "payload": {"speaker": "Doctor", "text": ""}\n}';
		key.value = newKey();
		const answers = h("ol.answers", { "aria-label": t("answers"), "aria-live": "polite" });
		const fresh = button(t("newKey"), () => (key.value = newKey()), { kind: "small" });
		const wrong = h("p.error", { role: "alert" });
		body.addEventListener("input", () => (wrong.textContent = ""));
		const submit = async (event) => {
			event.preventDefault();
			try {
				JSON.parse(body.value);
			} catch (error) {
				wrong.textContent = t("notJson", { error: error.message });
				body.focus();
				return;
			}
			const line = h("li.answer.pending", {}, t("posting"));
			answers.prepend(line);
			while (answers.children.length > 20) answers.lastChild.remove();
			try {
				const headers = { "Content-Type": "application/json", ...(key.value ? { "Idempotency-Key": key.value } : {}) };
				const answer = await call(`consultations/${id.value}/events`, { method: "POST", body: body.value, headers, signal: this.gone.signal });
				const found = await answer.json();
				line.classList.replace("pending", "good");
				fill(line, h("b", {}, answer.status), " ", found.duplicate ? h("span.tag.warn", {}, t("duplicate")) : t("stored"), ` · #${found.sequence} · `,
					h("a", { href: address(["consultations", found.consultation_id], { at: found.sequence, event: found.message_id }) }, t("openEvent")), h("br"), h("code", {}, found.message_id));
			} catch (problem) {
				if (problem.name === "AbortError") return;
				line.classList.replace("pending", "bad");
				fill(line, h("b", {}, problem.status || ""), " ", problemBox(problem));
			}
		};
		const form = h("form.card", { onsubmit: submit },
			h("h2", {}, t("oneEvent")),
			field(t("consultation"), id, t("idHint")),
			field(t("eventJson"), body), wrong,
			h("div.bar.end", {}, field(t("key"), key, t("keyHint")), fresh),
			h("div.bar.wrap", {}, h("button.button.primary", { type: "submit" }, t("postAction")),
				button(t("commands"), () => commands(postCommands(id.value || "c-1", body.value, key.value)), { glyph: "code" })),
			answers);
		return form;
	}

	// -- a file ---------------------------------------------------------------------------------------------------------

	fileCard() {
		const file = h("input", { type: "file", accept: ".ndjson,.jsonl,.json,application/x-ndjson", required: true });
		const id = h("input", { type: "text", pattern: "[A-Za-z0-9_\\-]{1,128}", maxlength: 128, autocomplete: "off", spellcheck: "false" });
		const bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": t("progress") });
		const status = h("p", { role: "status" });
		const refused = h("ol.answers", { "aria-label": t("refusedLines") });
		const problemPlace = h("div");
		const submit = h("button.button.primary", { type: "submit" }, t("postFile"));
		const stop = button(t("stop"), () => this.upload?.abort(), { hidden: true });
		const run = async (event) => {
			event?.preventDefault();
			this.upload = new AbortController();
			fill(refused);
			fill(problemPlace);
			bar.hidden = stop.hidden = false;
			submit.disabled = true;
			const done = { accepted: 0, duplicates: 0, refused: 0, size: 0 };
			const total = file.files[0].size;
			const show = (note = "") => {
				bar.value = total ? done.size / total : 1;
				status.textContent = `${t("uploaded", { accepted: count(done.accepted), duplicates: count(done.duplicates), refused: count(done.refused), size: bytes(done.size), total: bytes(total) })}${note}`;
			};
			try {
				const signal = AbortSignal.any([this.upload.signal, this.gone.signal]);
				for await (const batch of batches(file.files[0])) {
					await this.postBatch(batch, id.value, done, refused, signal, show);
					done.size += batch.size;
					show();
				}
				show(` · ${t("uploadDone")}`);
			} catch (problem) {
				if (problem.name === "AbortError") show(` · ${t("stopped")}`);
				else fill(problemPlace, problemBox(problem, () => run(null)));
			} finally {
				stop.hidden = true;
				submit.disabled = false;
			}
		};
		return h("form.card", { onsubmit: run },
			h("h2", {}, t("aFile")), h("p.muted", {}, t("fileHint")),
			field(t("file"), file), field(t("consultationOptional"), id, t("fileIdHint")),
			h("div.bar", {}, submit, stop), bar, status, problemPlace, refused);
	}

	/** Post one batch, again while the service asks to wait; lines that it refuses are listed and left out. */
	async postBatch(batch, id, done, refused, signal, show) {
		const path = id ? `consultations/${id}/events/batch` : "events/batch";
		const key = await batchKey(batch);
		let lines = batch.lines;
		for (let wait = 1; ; ) {
			if (!lines.some((line) => line.trim())) return;
			const headers = { "Content-Type": "application/x-ndjson", "Idempotency-Key": key };
			try {
				const answer = await call(path, { method: "POST", body: lines.join("\n"), headers, signal });
				this.count((await answer.json()).results, done);
				return;
			} catch (problem) {
				if (!(problem instanceof Problem)) throw problem;
				const bad = problem.document.lines;
				if (problem.status === 422 && Array.isArray(bad) && bad.length) {
					// a refused line becomes an empty one: the keys of the others come from their line numbers
					lines = [...lines];
					for (const one of bad) {
						const number = typeof one === "number" ? one : one.line;
						lines[number - 1] = "";
						done.refused += 1;
						if (refused.children.length < LISTED) refused.append(h("li.answer.bad", {}, h("b", {}, t("line", { n: count(batch.first + number) })), " ", foreign(h("span"), one.reason ?? one.detail ?? problem.message)));
					}
					if (problem.slug === "idempotency-key-reused" && problem.document.results) {
						this.count(problem.document.results, done);
						return;
					}
					show();
					continue;
				}
				if (![0, 409, 429, 503].includes(problem.status)) throw problem;
				const seconds = Math.min(LONGEST_WAIT, problem.retryAfter || wait);
				show(` · ${t("waitingFor", { reason: problem.title, n: seconds })}`);
				await pause(seconds, signal);
				signal.throwIfAborted();
				wait *= 2;
			}
		}
	}

	count(results, done) {
		for (const one of results) {
			if (!one || one.message_id === undefined) continue;
			if (one.duplicate) done.duplicates += 1;
			else done.accepted += 1;
		}
	}
}

/** Yield the parts of a file that are posted at once, with the number of lines before each. */
async function* batches(file) {
	const reader = file.stream().pipeThrough(new TextDecoderStream("utf-8", { fatal: true })).getReader();
	const size = (text) => new Blob([text]).size;
	let rest = "";
	let lines = [];
	let taken = 0;
	let first = 0;
	for (let part = await reader.read(); ; part = await reader.read()) {
		const found = (rest + (part.value ?? "")).split("\n");
		rest = part.done ? "" : found.pop();
		for (const line of found) {
			lines.push(line);
			taken += size(line) + 1;
			if (lines.length >= BATCH_EVENTS || taken >= BATCH_BYTES) {
				yield { lines, size: taken, first };
				first += lines.length;
				lines = [];
				taken = 0;
			}
		}
		if (part.done) break;
	}
	if (lines.length) yield { lines, size: taken, first };
}

/** Return a key that the same lines get again, so that posting a file twice stores it once. */
async function batchKey(batch) {
	if (!crypto.subtle) return `${newKey()}`;
	const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(batch.lines.join("\n")));
	return `file-${[...new Uint8Array(digest)].slice(0, 16).map((byte) => byte.toString(16).padStart(2, "0")).join("")}-${batch.first}`;
}

/** Return a random UUID; plain HTTP beyond loopback has no crypto.randomUUID. */
function newKey() {
	const random = crypto.getRandomValues(new Uint8Array(16));
	random[6] = (random[6] & 15) | 64;
	random[8] = (random[8] & 63) | 128;
	const text = [...random].map((byte) => byte.toString(16).padStart(2, "0")).join("");
	return text.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

function postCommands(id, body, key) {
	const href = new URL(`consultations/${id}/events`, BASE).href;
	return {
		curl: `curl -i ${quoted(href)}${curlToken()} \\\n  -H 'Content-Type: application/json' \\\n  -H ${quoted(`Idempotency-Key: ${key}`)} \\\n  -d ${quoted(body)}`,
		Python: asPython(`print(client.post("${id}", ${JSON.stringify(body)}, key="${key}"))`),
	};
}

customElements.define("fi-post", Post);
