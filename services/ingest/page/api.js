/**
 * The service's HTTP interface, as this page uses it.
 *
 * The token is kept in this module's memory only. Every refusal is a Problem (RFC 9457). A Follower reads a stream of
 * events, connects again by itself, and resumes after the last event that it has seen.
 */

import { t } from "./texts.js";

/** Where the service is: one level above the page's files, also behind a path of a proxy. */
export const BASE = new URL("..", import.meta.url);
export const CONFIG = document.querySelector('meta[name="fiq"]').dataset;
const required = CONFIG.token === "required";
export const session = { required, name: "", scopes: required ? [] : ["admin"], prefix: "", expires: null };

let token = "";

export const may = (scope) => session.scopes.includes(scope) || session.scopes.includes("admin");

/** Why a request was not answered as asked. */
export class Problem extends Error {
	constructor(status, document, retryAfter = 0) {
		super(document.detail || document.title);
		this.status = status;
		this.slug = (document.type || "").split("/").pop();
		this.title = document.title;
		this.document = document;
		this.retryAfter = retryAfter;
	}

	/** What the user can do about it. */
	get advice() {
		const known = { 0: "doUnreachable", 401: "doToken", 403: "doScope", 429: "doWait", 503: "doWait", 500: "doLogs" };
		return known[this.status] ? t(known[this.status]) : "";
	}
}

/** Use a token from now on, and ask what it allows. Throws a Problem: it is not valid. */
export async function signIn(secret) {
	const before = token;
	token = secret;
	try {
		Object.assign(session, await json("token", { quiet: true }));
	} catch (problem) {
		token = before;
		throw problem;
	}
	window.dispatchEvent(new Event("fi-session"));
}

export function signOut() {
	token = "";
	Object.assign(session, { name: "", scopes: [], prefix: "", expires: null });
	window.dispatchEvent(new Event("fi-session"));
}

export function url(path, query = {}) {
	const found = new URL(path, BASE);
	for (const [name, value] of Object.entries(query)) {
		if (value !== undefined && value !== null && value !== "") found.searchParams.set(name, value);
	}
	return found;
}

/** Send a request. Returns its response; throws a Problem, or an AbortError. */
export async function call(path, { method = "GET", query, body, headers = {}, signal, quiet = false } = {}) {
	const sent = { Accept: "application/json", ...headers };
	if (token) sent.Authorization = `Bearer ${token}`;
	let response;
	try {
		const options = { method, body, headers: sent, signal, cache: "no-store", credentials: "omit", redirect: "error" };
		response = await fetch(url(path, query), { ...options, referrerPolicy: "no-referrer" });
	} catch (error) {
		if (error.name === "AbortError") throw error;
		throw new Problem(0, { title: t("unreachable"), detail: t("unreachableDetail") });
	}
	if (response.ok) return response;
	const text = await response.text().catch(() => "");
	let document = { title: `HTTP ${response.status}` };
	try {
		document = JSON.parse(text);
	} catch {
		document.detail = text.slice(0, 200);
	}
	const problem = new Problem(response.status, document, Number(response.headers.get("Retry-After")) || 0);
	if (problem.status === 401 && !quiet) window.dispatchEvent(new CustomEvent("fi-unauthorized", { detail: problem }));
	throw problem;
}

/** Return the answer's text. A connection that ends within it is a Problem, too. */
export async function text(path, options) {
	const response = await call(path, options);
	try {
		return await response.text();
	} catch (error) {
		if (error.name === "AbortError") throw error;
		throw new Problem(0, { title: t("unreachable"), detail: t("unreachableDetail") });
	}
}

export const json = async (path, options) => JSON.parse(await text(path, options));

/** Return the path and query of a URL that the service gave, for `call`. */
export const relative = (link) => (link ? link.replace(/^\//, "") : null);

export const pause = (seconds, signal) =>
	new Promise((done) => {
		const timer = setTimeout(done, seconds * 1000);
		signal?.addEventListener("abort", () => {
			clearTimeout(timer);
			done();
		});
	});

/** The service writes at least every 15 s; after this silence the connection is given up, seconds. */
const SILENCE = 40;
const LONGEST_WAIT = 5;

/**
 * Follows `path` from the position `after` on.
 *
 * `onrecords` gets the raw texts of records with their positions, as they come; `onstate` is called after each change
 * of `state`: connecting, live, waiting (for the next try), paused, failed.
 */
export class Follower {
	constructor(path, query, after, { onrecords, onstate }) {
		Object.assign(this, { path, query, position: after, onrecords, onstate });
		this.state = "paused";
		this.problem = null;
		/** when the connection was lost, as a Date; null while it is there */
		this.lostAt = null;
		/** times that it came back */
		this.reconnects = 0;
	}

	start() {
		if (this.state !== "paused" && this.state !== "failed") return;
		this.stopped = new AbortController();
		this.run(this.stopped.signal);
	}

	stop() {
		this.stopped?.abort();
		this.lostAt = null;
		this.change("paused");
	}

	change(state, problem = null) {
		this.state = state;
		this.problem = problem;
		this.onstate(this);
	}

	async run(stopped) {
		let wait = 0.5;
		while (!stopped.aborted) {
			this.change("connecting", this.problem);
			try {
				await this.read(stopped, () => (wait = 0.5));
				if (stopped.aborted) return;
				this.lost(null);
			} catch (error) {
				if (stopped.aborted) return;
				const problem = error instanceof Problem ? error : new Problem(0, { title: t("unreachable") });
				if ([400, 401, 403, 404, 406, 410, 422, 501].includes(problem.status)) {
					this.change("failed", problem);
					return;
				}
				this.lost(problem);
			}
			await pause(wait, stopped);
			wait = Math.min(LONGEST_WAIT, wait * 2);
		}
	}

	lost(problem) {
		this.lostAt ??= new Date();
		this.change("waiting", problem);
	}

	async read(stopped, onlive) {
		const attempt = new AbortController();
		const abort = () => attempt.abort();
		stopped.addEventListener("abort", abort);
		let watchdog = setTimeout(abort, SILENCE * 1000);
		try {
			const query = { ...this.query, follow: 1, after: this.position };
			const options = { query, headers: { Accept: "text/event-stream" }, signal: attempt.signal };
			const response = await call(this.path, options);
			if (this.lostAt) this.reconnects += 1;
			const lostAt = this.lostAt;
			this.lostAt = null;
			onlive();
			this.change("live");
			this.onresumed?.(lostAt, this.position);
			const parser = new StreamParser();
			const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
			for (let part = await reader.read(); !part.done; part = await reader.read()) {
				clearTimeout(watchdog);
				watchdog = setTimeout(abort, SILENCE * 1000);
				const found = parser.push(part.value);
				this.position = parser.last || this.position;
				if (found.length) this.onrecords(found);
			}
		} finally {
			clearTimeout(watchdog);
			stopped.removeEventListener("abort", abort);
		}
	}
}

/** Splits a text/event-stream into its events: `id` and `data`. */
class StreamParser {
	constructor() {
		this.rest = "";
		this.id = "";
		/** of the last whole event, also of one without data */
		this.last = "";
		this.data = [];
	}

	push(chunk) {
		const found = [];
		const lines = (this.rest + chunk).split(/\r\n|\n|\r(?!$)/);
		this.rest = lines.pop();
		for (const line of lines) {
			if (line === "") {
				if (this.data.length) found.push({ id: this.id, data: this.data.join("\n") });
				this.data = [];
				this.last = this.id;
				continue;
			}
			const colon = line.indexOf(":");
			const name = colon < 0 ? line : line.slice(0, colon);
			const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
			if (name === "data") this.data.push(value);
			else if (name === "id") this.id = value;
		}
		return found;
	}
}
