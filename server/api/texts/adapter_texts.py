"""The texts of adapters that bring a chat template of their own."""

from collections import OrderedDict

from server.api.texts.text import Text

_MOST = 64  # compiled templates; each is a few hundred kilobytes


class AdapterTexts:
    """By template, whatever the adapters that have it are called: those that were used last are kept."""

    def __init__(self, base: Text) -> None:
        self._base = base
        self._texts: OrderedDict[str, Text] = OrderedDict()

    def for_template(self, template: str | None) -> Text:
        """The base's where there is none. Raises InvalidManifest, for a template that was never accepted."""
        if template is None:
            return self._base
        if template not in self._texts:
            self._texts[template] = self._base.with_template(template)
            if len(self._texts) > _MOST:
                self._texts.popitem(last=False)
        self._texts.move_to_end(template)
        return self._texts[template]
