// Keys, swapping and copying: what needs no Python.
const studio = {
  swap() {
    document.querySelector("#studio").classList.toggle("swapped");
  },
  async copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Without https and off this machine browsers have no clipboard for pages.
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    document.body.dataset.copied = text;
    const told = document.querySelector("#copied");
    if (told) told.textContent = "copied";
  },
};
addEventListener("keydown", (event) => {
  // An open list can be scrolled, and would be a stop of its own on the way to the next control.
  if (event.key === "Tab")
    for (const list of document.querySelectorAll("[role=listbox]")) list.tabIndex = -1;
  const typing = event.target.closest(
    "input:not([type=range], [type=radio], [type=checkbox]), textarea, [contenteditable]",
  );
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "x") studio.swap();
  const keys = { a: "keep", b: "back", s: "stop" };
  document.querySelector(`#${keys[event.key]}`)?.click();
});
