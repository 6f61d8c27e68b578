// Nodes that are renewed each second without taking what a person is at: the press of a button, focus, scrolling.

/**
 * Of a button that is pressed on one element and let go on its successor the browser makes no click. The function that
 * this gives says whether a button is pressed within `place`; if so, `draw` is called once it is let go.
 */
export function whilePressed(place, draw) {
  let isPressed = false;
  let isDue = false;
  place.addEventListener("pointerdown", () => {
    isPressed = true;
    const release = () => {
      for (const end of ["pointerup", "pointercancel"]) removeEventListener(end, release);
      // Once the click has got to where it belongs.
      setTimeout(() => {
        isPressed = false;
        if (isDue) draw();
        isDue = false;
      });
    };
    for (const end of ["pointerup", "pointercancel"]) addEventListener(end, release);
  });
  return () => {
    isDue ||= isPressed;
    return isPressed;
  };
}

/** Replaces the children of `place` that have changed. Lists stay scrolled, and the same link has the focus. */
export function patch(place, nodes) {
  const focused = place.contains(document.activeElement) ? document.activeElement : null;
  const old = [...place.childNodes];
  nodes.forEach((node, at) => {
    const before = old[at];
    if (!before) {
      place.append(node);
    } else if (!before.isEqualNode(node)) {
      const top = before.scrollTop;
      before.replaceWith(node);
      if (top) node.scrollTop = top;
    }
  });
  for (const rest of old.slice(nodes.length)) rest.remove();
  if (!focused || focused.isConnected) return;
  const same = (one) => one.getAttribute("href") === focused.getAttribute("href") && one.textContent === focused.textContent;
  [...place.querySelectorAll(focused.localName)].find(same)?.focus({ preventScroll: true });
}
