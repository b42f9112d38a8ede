/** The conversation on the page: turns as elements, made without any HTML from the model. */

const WHO = { user: "You", assistant: "Model", text: "Text", error: "Error" };

/** An element with a class and a text. */
function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/**
 * A view on the element that holds the turns.
 * @param {HTMLElement} root
 */
export function conversation(root) {
  /** Stay at the end unless the reader has scrolled up. */
  const follow = (change) => {
    const atEnd = root.scrollHeight - root.scrollTop - root.clientHeight < 60;
    change();
    if (atEnd) root.scrollTop = root.scrollHeight;
  };

  /**
   * Add a turn.
   * @param {keyof typeof WHO} kind
   * @param {string} said
   * @param {string} given what stands before it and is not its own: the text that a model continues
   */
  function add(kind, said = "", given = "") {
    const turn = element("article", `turn ${kind}`);
    const body = element("p", "body");
    const own = element("span", "own", said);
    body.append(element("span", "given", given), own);
    turn.append(element("h2", "who", WHO[kind]), body);
    follow(() => root.append(turn));
    return {
      append: (piece) => follow(() => own.append(piece)),
      set: (whole) => follow(() => (own.textContent = whole)),
      note: (line) => follow(() => turn.append(element("p", "note", line))),
      busy: (on) => turn.setAttribute("aria-busy", String(on)),
    };
  }

  return { add, clear: () => root.replaceChildren() };
}
