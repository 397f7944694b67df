"""Policy artefacts and the engine that runs them: everything that acting needs, without torch."""
