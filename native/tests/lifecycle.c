/*
 * Opens a bundle, scores, meets errors at every stage, scores from several threads, and closes; several threads open
 * the bundle at once, too. For valgrind and the sanitizers, which see in a program what they do not see below Python.
 *
 *     lifecycle BUNDLE LIBONNXRUNTIME [THREADS]
 */
#include <errno.h>
#include <jql.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arrow_c.h"

enum { TEXTS = 6, MOST_HEADS = 64, MOST_IDS = 8192, MOST_SIZE = 4096 };

static const char* const texts[TEXTS] = {"Water boils.", "", NULL, "bad \xff", "9.9.9.9.9.9.9.9. </s> \xE2\x82\xAC",
                                         "a b c"};

static void expect(jql_status found, jql_status expected, const char* err) {
  if (found == expected) return;
  fprintf(stderr, "%s, expected %s: %s\n", jql_status_name(found), jql_status_name(expected), err);
  exit(1);
}

static void* use(void* engine) {
  char err[256];
  float scores[TEXTS * MOST_HEADS], embedding[MOST_SIZE];
  int32_t status[TEXTS], n_tokens[TEXTS], ids[MOST_IDS], truncated;
  uint8_t cut[TEXTS];
  int64_t offsets[2] = {0, 0};
  size_t n_ids, round;
  for (round = 0; round < 10; ++round) {
    expect(jql_score_texts(engine, texts, NULL, TEXTS, scores, n_tokens, cut, status, err, sizeof err), JQL_OK, err);
    if (status[3] != JQL_INVALID_TEXT || scores[0] != scores[0]) exit(2);
    expect(jql_score_texts(engine, texts, NULL, TEXTS, scores, NULL, NULL, NULL, err, sizeof err), JQL_INVALID_TEXT,
           err);
    expect(jql_embed_texts(engine, texts, NULL, 1, embedding, NULL, NULL, NULL, err, sizeof err), JQL_OK, err);
    expect(jql_tokenize(engine, texts[4], strlen(texts[4]), ids, MOST_IDS, &n_ids, &truncated, err, sizeof err), JQL_OK,
           err);
    expect(jql_tokenize(engine, "a", 1, ids, 0, &n_ids, NULL, err, sizeof err), JQL_BUFFER_TOO_SMALL, err);
    offsets[1] = (int64_t)n_ids;
    expect(jql_score_tokens(engine, ids, offsets, 1, scores, err, sizeof err), JQL_OK, err);
    offsets[0] = 1;
    expect(jql_score_tokens(engine, ids, offsets, 1, scores, err, sizeof err), JQL_INVALID_ARGUMENT, err);
    offsets[0] = 0;
    ids[0] = -1;
    expect(jql_score_tokens(engine, ids, offsets, 1, scores, err, sizeof err), JQL_INVALID_ARGUMENT, err);
  }
  return NULL;
}


/* A stream that fails: at its schema, or at its first array. */
static void keep(struct ArrowSchema* schema) { schema->release = NULL; }

static int good_schema(struct ArrowArrayStream* stream, struct ArrowSchema* out) {
  const struct ArrowSchema text = {"u", "", NULL, 0, 0, NULL, NULL, keep, NULL};
  (void)stream;
  *out = text;
  return 0;
}

static int bad_schema(struct ArrowArrayStream* stream, struct ArrowSchema* out) {
  (void)stream, (void)out;
  return 5;
}

static int bad_next(struct ArrowArrayStream* stream, struct ArrowArray* out) {
  (void)stream, (void)out;
  return 5;
}

static const char* last_error(struct ArrowArrayStream* stream) {
  (void)stream;
  return "the disk is gone";
}

static void release(struct ArrowArrayStream* stream) { stream->release = NULL; }

static void meet_streams_that_fail(jql_engine* engine) {
  char err[256];
  struct ArrowArrayStream scores, input = {bad_schema, bad_next, last_error, release, NULL};
  struct ArrowArray array;
  expect(jql_score_arrow(engine, &input, NULL, &scores, err, sizeof err), JQL_INPUT_FAILED, err);
  input.get_schema = good_schema;
  expect(jql_score_arrow(engine, &input, "text", &scores, err, sizeof err), JQL_INVALID_ARGUMENT, err);
  expect(jql_score_arrow(engine, &input, NULL, &scores, err, sizeof err), JQL_OK, err);
  if (scores.get_next(&scores, &array) != EIO || !strstr(scores.get_last_error(&scores), "the disk is gone")) exit(3);
  scores.release(&scores);
}

static void* open_and_close(void* arguments) {
  char err[256];
  char** argv = arguments;
  jql_options options = JQL_OPTIONS_INIT;
  jql_engine* engine = NULL;
  options.onnxruntime = argv[2];
  options.threads = 1;
  options.certify = 0;
  expect(jql_open(argv[1], &options, &engine, err, sizeof err), JQL_OK, err);
  jql_close(engine);
  return NULL;
}

int main(int argc, char** argv) {
  char err[256];
  jql_options options = JQL_OPTIONS_INIT;
  jql_engine* engine = NULL;
  pthread_t threads[16];
  int n_threads = argc > 3 ? atoi(argv[3]) : 1, i;
  if (argc < 3 || n_threads < 1 || n_threads > 16) return 2;
  options.onnxruntime = argv[2];
  options.threads = 2;
  expect(jql_open("/nowhere", &options, &engine, err, sizeof err), JQL_INVALID_BUNDLE, err);
  options.variant = "none";
  expect(jql_open(argv[1], &options, &engine, err, sizeof err), JQL_UNSUPPORTED, err);
  options.variant = NULL;
  options.onnxruntime = "/nowhere.so";
  expect(jql_open(argv[1], &options, &engine, err, sizeof err), JQL_NO_RUNTIME, err);
  options.onnxruntime = argv[2];
  expect(jql_open(argv[1], &options, &engine, err, sizeof err), JQL_OK, err);
  expect(jql_score_tokens(engine, NULL, NULL, 1, NULL, err, sizeof err), JQL_INVALID_ARGUMENT, err);
  for (i = 0; i < n_threads; ++i) pthread_create(&threads[i], NULL, use, engine);
  for (i = 0; i < n_threads; ++i) pthread_join(threads[i], NULL);
  meet_streams_that_fail(engine);
  jql_close(engine);
  jql_close(NULL);
  for (i = 0; i < 2; ++i) pthread_create(&threads[i], NULL, open_and_close, argv);
  for (i = 0; i < 2; ++i) pthread_join(threads[i], NULL);
  puts("fine");
  return 0;
}
