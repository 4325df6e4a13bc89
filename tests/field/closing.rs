//! Sessions and workers that end in order: whatever a library has left behind, nobody else notices.
