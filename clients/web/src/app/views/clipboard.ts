//! What is copied. Pages that are not secure (a chatd in the house, without TLS) have no clipboard of their own, but may copy what is selected.

export async function copy(text: string): Promise<void> {
  // Browsers leave it out, whatever the types say.
  const clipboard = navigator.clipboard as Clipboard | undefined;
  if (clipboard) return clipboard.writeText(text);
  const before = document.activeElement;
  const field = document.createElement('textarea');
  field.value = text;
  field.className = 'for-ears';
  field.readOnly = true;
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand('copy');
  field.remove();
  if (before instanceof HTMLElement) before.focus();
  if (!isCopied) throw new Error('the browser does not allow it');
}
