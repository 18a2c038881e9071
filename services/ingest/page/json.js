/**
 * The raw text of the parts of a JSON document.
 *
 * JSON.parse rounds long integers and drops what a text had between its tokens. What people look at, copy and export
 * is therefore cut out of the answer's own text. The texts come from the service, which has checked that they are JSON.
 */

const SPACE = /[ \t\n\r]*/y;
const SCALAR = /[^,\]}\s]*/y;

function skip(text, at) {
	SPACE.lastIndex = at;
	SPACE.test(text);
	return SPACE.lastIndex;
}

/** Return the index after the string that begins at `at`. */
function endOfString(text, at) {
	for (let quote = text.indexOf('"', at + 1); quote >= 0; quote = text.indexOf('"', quote + 1)) {
		let slashes = 0;
		while (text[quote - 1 - slashes] === "\\") slashes += 1;
		if (slashes % 2 === 0) return quote + 1;
	}
	throw new SyntaxError("unfinished string");
}

/** Return the index after the value that begins at `at`. */
function endOfValue(text, at) {
	if (text[at] === '"') return endOfString(text, at);
	if (text[at] !== "{" && text[at] !== "[") {
		SCALAR.lastIndex = at;
		SCALAR.test(text);
		return SCALAR.lastIndex;
	}
	const mark = /["{}[\]]/g;
	mark.lastIndex = at;
	let depth = 0;
	for (let found = mark.exec(text); found; found = mark.exec(text)) {
		if (found[0] === '"') mark.lastIndex = endOfString(text, found.index);
		else if (found[0] === "{" || found[0] === "[") depth += 1;
		else if (--depth === 0) return mark.lastIndex;
	}
	throw new SyntaxError("unfinished value");
}

/** Return the raw texts of an object's members, by their names. */
export function members(text) {
	const found = new Map();
	let at = skip(text, skip(text, 0) + 1);
	while (at < text.length && text[at] !== "}") {
		const end = endOfString(text, at);
		const name = JSON.parse(text.slice(at, end));
		const start = skip(text, skip(text, end) + 1);
		const stop = endOfValue(text, start);
		found.set(name, text.slice(start, stop));
		at = skip(text, stop);
		if (text[at] === ",") at = skip(text, at + 1);
	}
	return found;
}

/** Call `token` for each token of a text, strings whole, without the space between them. */
function tokens(text, token) {
	let at = skip(text, 0);
	while (at < text.length) {
		let stop = at + 1;
		if (text[at] === '"') stop = endOfString(text, at);
		else if (!"{}[],:".includes(text[at])) stop = Math.max(stop, endOfValue(text, at));
		token(text.slice(at, stop));
		at = skip(text, stop);
	}
}

/** Return a text without the space between its tokens. */
export function compact(text) {
	const parts = [];
	tokens(text, (part) => parts.push(part));
	return parts.join("");
}

/** Return a text indented, with every token as it was. */
export function indent(text) {
	const parts = [];
	let depth = 0;
	let last = "";
	const line = () => parts.push(`\n${"  ".repeat(depth)}`);
	tokens(text, (part) => {
		if (part === "}" || part === "]") {
			depth -= 1;
			if (last !== "{" && last !== "[") line();
		} else if (last === "{" || last === "[" || last === ",") line();
		parts.push(part === ":" ? ": " : part);
		if (part === "{" || part === "[") depth += 1;
		last = part;
	});
	return parts.join("");
}
