"""``SharedState``: the parts of a module that travel between server and clients, and those that stay at a client."""

from fedamm_pl.protocol.classifier import Classifier
from fedamm_pl.protocol.messages import State


class SharedState(Classifier):
    """A classifier whose state has two parts: a shared one, and a personal one of each client."""

    shared: tuple[str, ...] = ("model.",)
    """Prefixes of the ``state_dict`` entries that travel between server and clients and are averaged. If they depend on
    an option, set them in the constructor."""

    personal: tuple[str, ...] = ()
    """Prefixes of the ``state_dict`` entries that stay at a client; they are kept between its rounds and never sent."""

    def shared_state(self) -> State:
        """Return copies of the ``state_dict`` entries that travel."""
        return self._entries(self.shared)

    def personal_state(self) -> State:
        """Return copies of the ``state_dict`` entries that stay at a client."""
        return self._entries(self.personal)

    def load_shared_state(self, state: State) -> None:
        """Copy the shared entries of a state into this module, in place; other entries are ignored.

        Raises:
            ValueError: If an entry is missing, unknown or of another shape.
        """
        state = {name: value for name, value in state.items() if name.startswith(self.shared)}
        try:
            missing, unknown = self.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise ValueError(f"Expected `state` to have the shapes of the module, got {error}.") from error
        if differing := sorted([*(name for name in missing if name.startswith(self.shared)), *unknown]):
            raise ValueError(
                f"Expected `state` to hold the shared entries of the module, got a difference in {differing}."
            )

    def load_personal_state(self, state: State) -> None:
        """Copy the personal entries of a state into this module, in place; other entries are ignored."""
        self.load_state_dict(
            {name: value for name, value in state.items() if name.startswith(self.personal)}, strict=False
        )

    def _entries(self, prefixes: tuple[str, ...]) -> State:
        return {name: value.detach().clone() for name, value in self.state_dict().items() if name.startswith(prefixes)}
