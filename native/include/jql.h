/*
 * libjql: text in, scores out.
 *
 * Opens a bundle (docs/bundle-format.md) and scores text with it: an exact tokenizer of its own, and the bundle's graph
 * in ONNX Runtime or OpenVINO, which are looked for when a bundle is opened. Plain C99 outside, C++17 inside.
 *
 * Rules that hold for every function:
 *  - An error is a status and a sentence: `err` is filled with at most `err_size` bytes, NUL included, and is empty
 *    after success. Both may be NULL and 0. Nothing is printed, no exception leaves the library.
 *  - The caller owns every buffer that it passes. After an error their content is undefined, unless stated otherwise.
 *  - One engine may be used by many threads at once. No thread outlives the call that started it, apart from the
 *    runtime's own, which end with jql_close.
 *  - Text is UTF-8 of a given length and need not end in NUL; NUL bytes are text.
 */
#ifndef JQL_H
#define JQL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define JQL_VERSION_MAJOR 0
#define JQL_VERSION_MINOR 1
#define JQL_VERSION_PATCH 0

#if defined(__GNUC__)
#define JQL_API __attribute__((visibility("default")))
#else
#define JQL_API
#endif

/* What went wrong. The numbers never change; new ones may be added. */
typedef enum jql_status {
  JQL_OK = 0,
  JQL_INVALID_ARGUMENT = 1, /* NULL, offsets that go back, an id outside the vocabulary, ... */
  JQL_INVALID_BUNDLE = 2,   /* no bundle there, another format, a damaged or missing file */
  JQL_INVALID_TEXT = 3,     /* a text is not UTF-8 */
  JQL_UNSUPPORTED = 4,      /* a tokenizer, variant, layout or readout that this library does not know */
  JQL_NO_RUNTIME = 5,       /* ONNX Runtime or OpenVINO was not found, or is of another version */
  JQL_RUNTIME_FAILED = 6,   /* ONNX Runtime or OpenVINO reported an error */
  JQL_PARITY = 7,           /* this machine computes something else than the bundle's reference */
  JQL_OUT_OF_MEMORY = 8,
  JQL_BUFFER_TOO_SMALL = 9,
  JQL_INPUT_FAILED = 10,    /* the Arrow stream that was passed in reported an error */
  JQL_INTERNAL = 11         /* a defect of this library: please report it */
} jql_status;

/* A bundle that is open. */
typedef struct jql_engine jql_engine;

/*
 * How a bundle is opened. Begin with JQL_OPTIONS_INIT, which sets `size`: a library that is newer or older than the
 * header finds out which fields the caller knows.
 */
typedef struct jql_options {
  size_t size;             /* sizeof(jql_options) */
  const char *variant;     /* a graph of the bundle by its name; NULL: "cpu-fp32" */
  const char *onnxruntime; /* path of libonnxruntime.so; NULL: see docs/native.md for where it is looked for */
  const char *openvino;    /* path of libopenvino_c.so; NULL: likewise */
  int32_t threads;         /* CPU threads that compute; 0: every core this process may use */
  int32_t verify;          /* 0: the files' SHA-256 are not compared with the manifest */
  int32_t certify;         /* 0: the probe documents are not computed; nothing is known of this machine then */
  int32_t reserved;        /* 0; no padding, whose bytes would be anything, becomes a field later */
} jql_options;

#define JQL_OPTIONS_INIT {sizeof(jql_options), NULL, NULL, NULL, 0, 1, 1, 0}

/* Version of the library that is loaded, "0.1.0". Never NULL. */
JQL_API const char *jql_version(void);

/* The name of a status as it is written here, "JQL_OK"; "unknown" for a number that is none. Never NULL. */
JQL_API const char *jql_status_name(jql_status status);

/*
 * Opens the bundle in the directory `bundle_dir` and loads a graph. `options` may be NULL. Computes the bundle's short
 * probe documents and compares them with the reference, as docs/bundle-format.md asks. On success *engine is set and
 * must be given to jql_close; after an error it is NULL.
 *
 * Sets the environment variable ORT_DISABLE_TELEMETRY where it is not set: ONNX Runtime from 1.29 on would send reports.
 * A program whose threads change the environment meanwhile sets it itself, before.
 *
 * A bundle whose tokenizer this library does not know opens as well; calls with text then return JQL_UNSUPPORTED.
 */
JQL_API jql_status jql_open(const char *bundle_dir, const jql_options *options, jql_engine **engine, char *err,
                            size_t err_size);

/* Frees an engine that no thread uses any more; NULL is fine. */
JQL_API void jql_close(jql_engine *engine);

/* Number of scores per document; 0 for NULL, or a bundle that only embeds. */
JQL_API size_t jql_head_count(const jql_engine *engine);

/* Name of score `index`; lives as long as the engine. NULL where there is none. */
JQL_API const char *jql_head_name(const jql_engine *engine, size_t index);

/* The longest document in tokens, special tokens included: longer text is truncated. 0 for NULL. */
JQL_API size_t jql_max_tokens(const jql_engine *engine);

/* Floats of one embedding. 0 for NULL. */
JQL_API size_t jql_embedding_size(const jql_engine *engine);

/*
 * Writes the ids of one text, special tokens included, truncated to jql_max_tokens: exactly those of the bundle's
 * tokenizer.json. `capacity` counts ids; jql_max_tokens are always enough. Where they do not fit, *n_ids says how many
 * there are and JQL_BUFFER_TOO_SMALL is returned. `truncated` may be NULL.
 */
JQL_API jql_status jql_tokenize(jql_engine *engine, const char *text, size_t length, int32_t *ids, size_t capacity,
                                size_t *n_ids, int32_t *truncated, char *err, size_t err_size);

/*
 * Scores documents that are ids already, special tokens included (tokenizer.prefix and tokenizer.suffix of
 * bundle.json): without them the scores are others. Document i is ids[offsets[i]] up to ids[offsets[i + 1]]: offsets has
 * n_docs + 1 entries and starts at 0. `scores` is [n_docs][head_count], by rows.
 */
JQL_API jql_status jql_score_tokens(jql_engine *engine, const int32_t *ids, const int64_t *offsets, size_t n_docs,
                                    float *scores, char *err, size_t err_size);

/*
 * Scores texts. `lengths` are bytes; NULL: every text ends in NUL. A text that is NULL is null: its scores are NaN, its
 * tokens 0. An empty text is scored.
 *
 *   scores     [n_docs][head_count], by rows
 *   n_tokens   [n_docs] or NULL: tokens of each document after truncation, special tokens included
 *   truncated  [n_docs] or NULL: 1 where a document was longer than jql_max_tokens
 *   status     [n_docs] or NULL. Given: a text that is not UTF-8 gets JQL_INVALID_TEXT there and NaN as its scores, and
 *              all others are scored. NULL: such a text is an error of the whole call, which names it.
 */
JQL_API jql_status jql_score_texts(jql_engine *engine, const char *const *texts, const size_t *lengths, size_t n_docs,
                                   float *scores, int32_t *n_tokens, uint8_t *truncated, int32_t *status, char *err,
                                   size_t err_size);

/* The same for embeddings, L2-normalized: `embeddings` is [n_docs][jql_embedding_size]. */
JQL_API jql_status jql_embed_texts(jql_engine *engine, const char *const *texts, const size_t *lengths, size_t n_docs,
                                   float *embeddings, int32_t *n_tokens, uint8_t *truncated, int32_t *status, char *err,
                                   size_t err_size);

/*
 * Scores a stream of the Arrow C data interface (https://arrow.apache.org/docs/format/CStreamInterface.html).
 *
 * `input` gives arrays of text (utf8, large_utf8, string_view), or record batches (struct) whose column `column` is
 * such an array; `column` is NULL for the former. The stream `scores` gives for each array a record batch of as many
 * rows: score_<head> float32 for each head, n_tokens int32, truncated bool; null where the text is null. A text that is
 * not UTF-8 is an error of the stream.
 *
 * On success the library owns `input`, whose `release` is NULL from then on, and `scores` owns all that is needed; it
 * must be released before jql_close. Arrays are pulled from `input` one by one, as `scores` is asked for them. After an
 * error `input` is untouched. A stream belongs to one thread at a time, as the Arrow interface has it.
 */
struct ArrowArrayStream;
JQL_API jql_status jql_score_arrow(jql_engine *engine, struct ArrowArrayStream *input, const char *column,
                                   struct ArrowArrayStream *scores, char *err, size_t err_size);

#ifdef __cplusplus
}
#endif

#endif
